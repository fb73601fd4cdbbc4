//! The responses that are kept for `previous_response_id`, `item_reference` and `GET /v1/responses/{id}`. They are in memory only:
//! the least recently used ones make room for new ones.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashlink::LruCache;
use serde_json::Value;

use crate::{Error, Result};

/// Limit on the responses that are kept.
const MAX_RESPONSES: usize = 4096;

/// Limit on the bytes of all of them.
const MAX_BYTES: usize = 64 << 20;

/// Limit on the bytes of one of them, with the conversation before it.
const MAX_RESPONSE_BYTES: usize = MAX_BYTES / 8;

/// Bytes that an id costs in the maps, about.
const ID_BYTES: usize = 128;

/// A response that is kept. As text, a conversation is several times smaller than as values.
#[derive(Debug)]
pub(super) struct StoredResponse {
    /// The response object.
    pub(super) response: Box<str>,
    /// The items of the conversation: of the responses before it, its own input, its output.
    items: Box<str>,
    /// Which of the items are its own input.
    own: Range<usize>,
    /// Ids of the items that were made for it.
    ids: Vec<String>,
}

impl StoredResponse {
    /// A response to keep, or `None` if it is too large.
    pub(super) fn new(response: &Value, items: Vec<Value>, own: Range<usize>, ids: Vec<String>) -> Option<Self> {
        let stored =
            Self { response: response.to_string().into(), items: Value::from(items).to_string().into(), own, ids };
        (stored.bytes() <= MAX_RESPONSE_BYTES).then_some(stored)
    }

    /// All items of the conversation.
    pub(super) fn items(&self) -> Result<Vec<Value>> {
        serde_json::from_str(&self.items)
            .map_err(|e| Error::internal(format!("a stored response is unreadable: {e}")).caused_by(e))
    }

    /// The items of its own input.
    pub(super) fn input(&self) -> Result<Vec<Value>> {
        Ok(self.items()?.drain(self.own.clone()).collect())
    }

    fn bytes(&self) -> usize {
        self.response.len() + self.items.len() + (self.ids.len() + 1) * ID_BYTES
    }
}

/// All responses that are kept.
#[derive(Debug, Default)]
pub(in crate::server) struct ResponseStore(Mutex<Kept>);

#[derive(Debug)]
struct Kept {
    responses: LruCache<String, Arc<StoredResponse>>,
    /// The response of each item.
    items: HashMap<String, String>,
    bytes: usize,
}

impl Default for Kept {
    fn default() -> Self {
        Self { responses: LruCache::new_unbounded(), items: HashMap::new(), bytes: 0 }
    }
}

impl ResponseStore {
    /// Keeps a response, unless one of this id is there. The least recently used ones make room.
    pub(super) fn insert(&self, id: &str, response: StoredResponse) {
        let mut kept = self.kept();
        if kept.responses.contains_key(id) {
            return;
        }
        kept.bytes += response.bytes();
        for item in &response.ids {
            kept.items.insert(item.clone(), id.to_owned());
        }
        kept.responses.insert(id.to_owned(), Arc::new(response));
        while kept.responses.len() > MAX_RESPONSES || kept.bytes > MAX_BYTES {
            let Some((_, oldest)) = kept.responses.remove_lru() else { return };
            kept.forget(&oldest);
        }
    }

    /// Whether a response is there. This is no use of it.
    pub(super) fn contains(&self, id: &str) -> bool {
        self.kept().responses.contains_key(id)
    }

    /// A response, which is then the most recently used one.
    pub(super) fn get(&self, id: &str) -> Option<Arc<StoredResponse>> {
        self.kept().responses.get(id).cloned()
    }

    /// An item of any response.
    pub(super) fn item(&self, id: &str) -> Result<Option<Value>> {
        let response = {
            let mut kept = self.kept();
            let Some(response) = kept.items.get(id).cloned() else { return Ok(None) };
            kept.responses.get(&response).cloned()
        };
        let Some(response) = response else { return Ok(None) };
        Ok(response.items()?.into_iter().find(|item| item["id"] == id))
    }

    /// Removes a response, and tells whether it was there.
    pub(super) fn remove(&self, id: &str) -> bool {
        let mut kept = self.kept();
        let Some(response) = kept.responses.remove(id) else { return false };
        kept.forget(&response);
        true
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// Drops what belongs to a response that has been taken out.
    fn forget(&mut self, response: &StoredResponse) {
        self.bytes -= response.bytes();
        for item in &response.ids {
            self.items.remove(item);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn response(text: &str, item: &str) -> StoredResponse {
        let items = vec![json!({"id": "before"}), json!({"id": item, "text": text})];
        StoredResponse::new(&json!({}), items, 1..2, vec![item.to_owned()]).expect("it is small enough")
    }

    #[test]
    fn what_was_not_used_for_longest_makes_room() {
        let store = ResponseStore::default();
        for i in 0..MAX_RESPONSES {
            store.insert(&format!("r{i}"), response("", &format!("i{i}")));
        }
        assert!(store.get("r0").is_some() && store.item("i1").unwrap().is_some());
        store.insert("new", response("", "i-new"));
        store.insert("newer", response("", "i-newer"));
        let there = ["r0", "r1", "r2", "r3", "r4", "new", "newer"].map(|id| store.contains(id));
        assert_eq!(there, [true, true, false, false, true, true, true]);
        assert_eq!((store.item("i2").unwrap(), store.kept().items.len()), (None, MAX_RESPONSES));

        let store = ResponseStore::default();
        let large = "x".repeat(MAX_RESPONSE_BYTES - 1000);
        for i in 0..9 {
            store.insert(&format!("r{i}"), response(&large, &format!("i{i}")));
        }
        assert!(!store.contains("r0") && store.contains("r1") && store.kept().bytes <= MAX_BYTES);
        let larger = vec![json!("x".repeat(MAX_RESPONSE_BYTES))];
        assert!(StoredResponse::new(&json!({}), larger, 0..1, vec![]).is_none());
    }

    #[test]
    fn a_removed_response_leaves_nothing() {
        let store = ResponseStore::default();
        store.insert("r", response("one", "i"));
        store.insert("r", response("two", "j"));
        assert_eq!(store.item("i").unwrap().unwrap()["text"], "one");
        assert_eq!(store.get("r").unwrap().input().unwrap(), [json!({"id": "i", "text": "one"})]);
        assert!(store.remove("r") && !store.remove("r"));
        let kept = store.kept();
        assert_eq!((kept.bytes, kept.items.len(), kept.responses.len()), (0, 0, 0));
    }
}

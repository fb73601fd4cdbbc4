//! Files over HTTP: purposes, expiry, lists, contents.

use serde_json::json;

use crate::finetune::{LINES, text};
use crate::harness::{Answer, Options, Server, eventually};

/// Changes an object in the state directory of a server that is not running.
pub fn change_stored(state: &std::path::Path, id: &str, field: &str, value: i64) {
    let db = rusqlite::Connection::open(state.join("training.sqlite")).unwrap();
    let path = format!("$.{field}");
    let change = "UPDATE objects SET doc = json_set(doc, ?1, ?2) WHERE id = ?3";
    assert_eq!(db.execute(change, rusqlite::params![path, value, id]).unwrap(), 1);
}

/// Uploads a file that expires, with more headers on its part than it needs.
fn expiring(server: &Server, anchor: &str, seconds: &str) -> Answer {
    let part = |name: &str, rest: &str| format!("--x\r\ncontent-disposition: form-data; name=\"{name}\"{rest}\r\n");
    server.multipart(&format!(
        "{}\r\nuser_data\r\n{}\r\n{anchor}\r\n{}\r\n{seconds}\r\n{}content-type: text/plain\r\nx-more: 1\r\nexpires: 0\r\n\r\n\
         anything\r\n--x--\r\n",
        part("purpose", ""),
        part("expires_after[anchor]", ""),
        part("expires_after[seconds]", ""),
        part("file", "; filename=\"a b.txt\""),
    ))
}

#[test]
fn files_are_kept_listed_read_and_deleted() {
    let server = Server::start();
    let (first, second) = (server.file(), server.file());
    let list = |query: &str| {
        let list = server.get(&format!("/v1/files{query}")).json();
        let ids: Vec<String> = list["data"].as_array().unwrap().iter().map(|file| text(&file["id"])).collect();
        assert_eq!(list["first_id"], json!(ids.first()));
        assert_eq!(list["last_id"], json!(ids.last()));
        (ids, list["has_more"] == true)
    };
    assert_eq!(list(""), (vec![second.clone(), first.clone()], false));
    assert_eq!(list("?limit=1&order=asc"), (vec![first.clone()], true));
    assert_eq!(list(&format!("?after={second}")), (vec![first.clone()], false));
    assert_eq!(list("?purpose=fine-tune-results"), (vec![], false));
    let file = server.get(&format!("/v1/files/{first}")).json();
    assert_eq!(file["bytes"], LINES.len());
    for (field, want) in
        [("object", "file"), ("filename", "train.jsonl"), ("purpose", "fine-tune"), ("status", "processed")]
    {
        assert_eq!(file[field], want);
    }
    assert_eq!(server.get(&format!("/v1/files/{first}/content")).text, LINES);
    let delete = || server.send("DELETE", &format!("/v1/files/{first}"), &[], b"");
    assert_eq!(delete().json(), json!({"id": first, "object": "file", "deleted": true}));
    let (status, _, param, _) = delete().error();
    assert_eq!((status, param), (404, json!("file_id")));
    assert_eq!(server.get(&format!("/v1/files/{first}/content")).status, 404);
}

#[test]
fn a_bad_upload_is_refused_by_name_and_leaves_nothing() {
    let server = Server::start();
    let part =
        |name: &str| format!("--x\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\nfine-tune\r\n--x--\r\n");
    for (answer, param, message) in [
        (server.upload("fine-tune-results", LINES), "purpose", "\"fine-tune\""),
        (server.upload("batch_output", LINES), "purpose", "\"batch\""),
        (server.upload(&"x".repeat(5000), LINES), "purpose", "1024 bytes"),
        (server.multipart(&part("purpose")), "file", "missing"),
        (server.multipart(&part("porpoise")), "porpoise", "`purpose`"),
        (server.multipart(&(part("purpose").replace("--x--\r\n", "") + &part("purpose"))), "purpose", "twice"),
        (expiring(&server, "created_at", "3599"), "expires_after.seconds", "from 3600 to 2592000"),
        (expiring(&server, "created_at", "soon"), "expires_after.seconds", "\"soon\""),
        (expiring(&server, "last_active_at", "3600"), "expires_after.anchor", "\"created_at\""),
    ] {
        let (status, text, at, _) = answer.error();
        assert_eq!((status, at), (400, json!(param)), "{text}");
        assert!(text.contains(message), "{text}");
    }
    assert_eq!(server.post("/v1/files", json!({})).error().3, "invalid_multipart");
    let (status, _, param, code) = server.upload("fine-tune", &LINES.repeat(20_000)).error();
    assert_eq!((status, param, code), (413, json!("file"), json!("file_too_large")));
    assert_eq!(server.get("/v1/files").json()["data"], json!([]));
    let left: Vec<_> = std::fs::read_dir(server.dir.path().join("state/files")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn every_purpose_is_stored_as_it_is() {
    let server = Server::start();
    for purpose in ["batch", "user_data", "evals", "assistants", "vision"] {
        let file = server.upload(purpose, "not\nJSON").json();
        assert_eq!((&file["purpose"], &file["status"]), (&json!(purpose), &json!("processed")), "{file}");
        assert_eq!(server.get(&format!("/v1/files/{}/content", text(&file["id"]))).text, "not\nJSON");
        let listed = server.get(&format!("/v1/files?purpose={purpose}")).json();
        assert_eq!(listed["data"], json!([file]));
    }
    let bad = server.upload("fine-tune", "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": 1}\n").json();
    assert_eq!(bad["status"], "error", "{bad}");
    assert!(text(&bad["status_details"]).contains("line 2"), "{bad}");
    assert_eq!(server.upload("fine-tune", "").json()["status"], "error");
    let job =
        json!({"model": crate::harness::BASE, "training_file": text(&server.upload("batch", LINES).json()["id"])});
    let (status, message, param, _) = server.post("/v1/fine_tuning/jobs", job).error();
    assert_eq!((status, param), (400, json!("training_file")), "{message}");
}

#[test]
fn an_expired_file_is_gone() {
    let state = tempfile::tempdir().unwrap();
    let start = || Server::with(Options { state: Some(state.path().to_owned()), ..Options::default() });
    let server = start();
    let file = expiring(&server, "created_at", "3600").json();
    assert_eq!(file["expires_at"].as_u64().unwrap(), file["created_at"].as_u64().unwrap() + 3600, "{file}");
    assert_eq!((&file["filename"], &file["bytes"]), (&json!("a b.txt"), &json!(8)));
    let (id, kept) = (text(&file["id"]), server.file());
    drop(server);
    change_stored(state.path(), &id, "expires_at", 1);

    let server = start();
    let at = |rest: &str| format!("/v1/files/{id}{rest}");
    assert_eq!(server.get(&at("")).error().0, 404);
    assert_eq!(server.get(&at("/content")).error().0, 404);
    assert_eq!(server.send("DELETE", &at(""), &[], b"").error().0, 404);
    let listed = server.get("/v1/files").json();
    assert_eq!(
        listed["data"].as_array().unwrap().iter().map(|f| text(&f["id"])).collect::<Vec<_>>(),
        std::slice::from_ref(&kept)
    );
    eventually("its content is removed", || !state.path().join("files").join(&id).exists());
    assert!(state.path().join("files").join(kept).exists());
}

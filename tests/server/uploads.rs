//! Uploads in parts.

use md5::{Digest, Md5};
use serde_json::{Value, json};

use crate::files::change_stored;
use crate::finetune::{LINES, text};
use crate::harness::{Answer, Options, Server, eventually, merged};

impl Server {
    fn begin_upload(&self, bytes: usize) -> String {
        let upload = self.post("/v1/uploads", upload(bytes)).json();
        assert_eq!((&upload["object"], &upload["status"]), (&json!("upload"), &json!("pending")), "{upload}");
        text(&upload["id"])
    }

    fn part(&self, upload: &str, data: &str) -> Answer {
        self.form(
            upload,
            &format!("--x\r\ncontent-disposition: form-data; name=\"data\"; filename=\"p\"\r\n\r\n{data}\r\n--x--\r\n"),
        )
    }

    fn form(&self, upload: &str, body: &str) -> Answer {
        let path = format!("/v1/uploads/{upload}/parts");
        self.send("POST", &path, &[("content-type", "multipart/form-data; boundary=x")], body.as_bytes())
    }

    fn complete_upload(&self, upload: &str, body: Value) -> Answer {
        self.post(&format!("/v1/uploads/{upload}/complete"), body)
    }
}

fn upload(bytes: usize) -> Value {
    json!({"bytes": bytes, "filename": "train.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"})
}

#[test]
fn the_parts_make_a_file_in_the_order_of_their_ids() {
    let server = Server::start();
    let id = server.begin_upload(LINES.len());
    let (first, second) = LINES.split_at(20);
    let [second, first, other] = [second, first, "unused"].map(|data| {
        let part = server.part(&id, data).json();
        assert_eq!((&part["object"], &part["upload_id"]), (&json!("upload.part"), &json!(id)), "{part}");
        text(&part["id"])
    });
    let complete = |body: Value| server.complete_upload(&id, body);
    for (body, param, message) in [
        (json!({"part_ids": [first]}), "part_ids", "the parts have 20 bytes"),
        (json!({"part_ids": [first, "part_x"]}), "part_ids", "no part \"part_x\""),
        (json!({"part_ids": [first, first]}), "part_ids", "named twice"),
        (json!({"part_ids": [first, second, other]}), "part_ids", "bytes"),
        (json!({"part_ids": [first, 2]}), "part_ids[1]", "a string"),
        (json!({}), "part_ids", "required"),
        (json!({"part_ids": [first, second], "md5": "00"}), "md5", "hexadecimal"),
    ] {
        let (status, text, at, _) = complete(body.clone()).error();
        assert_eq!((status, at), (400, json!(param)), "{body}: {text}");
        assert!(text.contains(message), "{body}: {text}");
    }
    let md5: String = Md5::digest(LINES).iter().map(|byte| format!("{byte:02X}")).collect();
    let done = complete(json!({"part_ids": [first, second], "md5": md5})).json();
    assert_eq!((&done["status"], &done["file"]["purpose"]), (&json!("completed"), &json!("fine-tune")), "{done}");
    assert_eq!((&done["file"]["filename"], &done["file"]["status"]), (&json!("train.jsonl"), &json!("processed")));
    let file = text(&done["file"]["id"]);
    assert_eq!(server.get(&format!("/v1/files/{file}")).json(), done["file"]);
    assert_eq!(server.get(&format!("/v1/files/{file}/content")).text, LINES);
    assert!(!server.dir.path().join("state/uploads").join(&id).exists(), "the parts are removed");
    let (status, message, _, code) = complete(json!({"part_ids": [first, second]})).error();
    assert_eq!((status, code), (400, json!("invalid_upload_status")));
    assert!(message.contains("completed"), "{message}");
}

#[test]
fn an_invalid_upload_or_part_is_refused_by_name() {
    let server = Server::start();
    for (fields, status, param, message) in [
        (json!({"bytes": 0}), 400, "bytes", "at least 1"),
        (json!({"bytes": (1 << 20) + 1}), 413, "bytes", "--max-file"),
        (json!({"filename": null}), 400, "filename", "required"),
        (json!({"filename": "a".repeat(600)}), 400, "filename", "512"),
        (json!({"mime_type": null}), 400, "mime_type", "required"),
        (json!({"purpose": "anything"}), 400, "purpose", "\"user_data\""),
        (json!({"expires_after": {"anchor": "created_at"}}), 400, "expires_after.seconds", "required"),
        (json!({"md5": "00"}), 400, "md5", "unknown field"),
    ] {
        let (got, text, at, _) = server.post("/v1/uploads", merged(upload(10), &fields)).error();
        assert_eq!((got, at), (status, json!(param)), "{fields}: {text}");
        assert!(text.contains(message), "{fields}: {text}");
    }
    let id = server.begin_upload(10);
    let part = |name: &str| format!("--x\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\na\r\n");
    for (answer, param, message) in [
        (server.form(&id, &(part("file") + "--x--\r\n")), "file", "one part, `data`"),
        (server.form(&id, &(part("data") + &part("data") + "--x--\r\n")), "data", "one part"),
        (server.form(&id, "--x--\r\n"), "data", "missing"),
        (server.part(&id, ""), "data", "empty"),
    ] {
        let (status, text, at, _) = answer.error();
        assert_eq!((status, at), (400, json!(param)), "{text}");
        assert!(text.contains(message), "{text}");
    }
    assert_eq!(server.part("upload_x", "a").error().2, "upload_id");
    let uploads: Vec<String> = (1..64).map(|_| server.begin_upload(1)).collect();
    assert_eq!(server.post("/v1/uploads", upload(1)).error().3, "too_many_uploads");
    let cancel = || server.post(&format!("/v1/uploads/{}/cancel", uploads[0]), json!({}));
    assert_eq!(server.part(&uploads[0], "a").status, 200);
    assert_eq!(cancel().json()["status"], "cancelled");
    assert_eq!((cancel().error().3, server.part(&uploads[0], "a").error().0), (json!("invalid_upload_status"), 400));
    assert!(!server.dir.path().join("state/uploads").join(&uploads[0]).exists());
    server.begin_upload(1);
}

#[test]
fn an_upload_outlives_a_restart_and_expires() {
    let state = tempfile::tempdir().unwrap();
    let start = || Server::with(Options { state: Some(state.path().to_owned()), ..Options::default() });
    let server = start();
    let [kept, late] = [(); 2].map(|()| {
        let id = server.begin_upload(2);
        let part = text(&server.part(&id, "a").json()["id"]);
        (id, part)
    });
    drop(server);
    change_stored(state.path(), &late.0, "expires_at", 1);

    let server = start();
    let second = text(&server.part(&kept.0, "b").json()["id"]);
    let body = json!({"part_ids": [kept.1, second]});
    let file = text(&server.complete_upload(&kept.0, body).json()["file"]["id"]);
    assert_eq!(server.get(&format!("/v1/files/{file}/content")).text, "ab");
    eventually("the parts are removed", || !state.path().join("uploads").join(&late.0).exists());
    assert!([400, 404].contains(&server.part(&late.0, "b").error().0));
}

//! The HTTP layer: CORS, HEAD, HTTP/2, keys, request ids, and hints for wrong routes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};

use crate::harness::{Answer, Options, Server, eventually};

const ORIGIN: &str = "http://localhost:3000";

/// A browser's question before it sends JSON with a key.
fn preflight(server: &Server, path: &str, origin: &str) -> Answer {
    let headers = [
        ("origin", origin),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,content-type,x-stainless-os"),
    ];
    server.send("OPTIONS", path, &headers, b"")
}

fn allowed_origin(answer: &Answer) -> Option<&str> {
    answer.headers.get("access-control-allow-origin").map(String::as_str)
}

#[test]
fn cors_is_off_by_default() {
    let server = Server::start();
    let answer = preflight(&server, "/v1/chat/completions", ORIGIN);
    assert_eq!((answer.error().0, allowed_origin(&answer)), (405, None));
    let answer = server.send("GET", "/v1/models", &[("origin", ORIGIN)], b"");
    assert_eq!((answer.status, allowed_origin(&answer)), (200, None));
}

#[test]
fn pages_of_an_allowed_origin_use_the_public_routes() {
    let server = Server::with(Options {
        api_keys: vec!["key".into()],
        admin_key: Some("boss".into()),
        cors_origins: vec!["https://app.example".into(), ORIGIN.into()],
        ..Options::default()
    });
    for path in ["/v1/chat/completions", "/v1/models", "/v1/files", "/tokenize", "/health"] {
        let answer = preflight(&server, path, ORIGIN);
        assert_eq!((answer.status, allowed_origin(&answer)), (200, Some(ORIGIN)), "{path}");
        let headers = &answer.headers["access-control-allow-headers"];
        assert!(headers.contains("authorization") && headers.contains("x-stainless-os"), "{headers}");
        assert!(answer.headers["access-control-allow-methods"].contains("DELETE"));
        assert!(answer.headers["vary"].contains("origin"), "{path}");
    }
    let get = |path: &str, origin, key| server.send("GET", path, &[("origin", origin), ("authorization", key)], b"");
    for (origin, key, status, allowed) in [
        (ORIGIN, "Bearer key", 200, Some(ORIGIN)),
        ("https://app.example", "Bearer key", 200, Some("https://app.example")),
        // The page can read why it was refused.
        (ORIGIN, "Bearer wrong", 401, Some(ORIGIN)),
        ("https://evil.example", "Bearer key", 200, None),
        ("http://localhost:3001", "Bearer key", 200, None),
    ] {
        let answer = get("/v1/models", origin, key);
        assert_eq!((answer.status, allowed_origin(&answer)), (status, allowed), "{origin} {key}");
    }
    assert!(get("/v1/models", ORIGIN, "Bearer key").headers["access-control-expose-headers"].contains("x-request-id"));
    for path in ["/admin/adapters", "/v1/load_lora_adapter"] {
        let answer = preflight(&server, path, ORIGIN);
        assert!(answer.status >= 400 && allowed_origin(&answer).is_none(), "{path}");
        assert_eq!(allowed_origin(&get(path, ORIGIN, "Bearer boss")), None, "{path}");
    }
}

#[test]
fn pages_of_any_origin() {
    let server = Server::with(Options { cors_origins: vec!["*".into()], ..Options::default() });
    let answer = preflight(&server, "/v1/chat/completions", "https://anywhere.example");
    assert_eq!((answer.status, allowed_origin(&answer)), (200, Some("*")));
    let answer = server.send("GET", "/v1/models", &[("origin", ORIGIN)], b"");
    assert_eq!((answer.status, allowed_origin(&answer)), (200, Some("*")));
    assert_eq!(allowed_origin(&preflight(&server, "/admin/adapters", ORIGIN)), None);
}

#[test]
fn head_answers_like_get_without_a_body() {
    let server = Server::start();
    for path in ["/live", "/health", "/ready", "/version", "/v1/models", "/v1/models/org/base", "/metrics"] {
        let (head, get) = (server.send("HEAD", path, &[], b""), server.get(path));
        assert_eq!((head.status, head.text.as_str()), (200, ""), "{path}");
        assert_eq!(head.headers["content-type"], get.headers["content-type"], "{path}");
        assert!(head.headers["content-length"] != "0", "{path}");
    }
    for path in ["/v1/completions", "/v1/chat/completions", "/tokenize"] {
        let head = server.send("HEAD", path, &[], b"");
        assert_eq!((head.status, head.text.as_str(), head.headers["allow"].as_str()), (405, "", "POST"), "{path}");
    }
    assert_eq!(server.send("HEAD", "/nowhere", &[], b"").status, 404);
}

#[test]
fn a_key_in_either_header() {
    let server = Server::with(Options {
        api_keys: vec!["one".into(), "two".into()],
        admin_key: Some("boss".into()),
        ..Options::default()
    });
    for (headers, status) in [
        (&[("x-api-key", "one")][..], 200),
        (&[("X-Api-Key", " two ")], 200),
        (&[("x-api-key", "three")], 401),
        (&[("x-api-key", "")], 401),
        (&[("x-api-key", "one"), ("authorization", "Bearer one")], 200),
        (&[("x-api-key", "one"), ("authorization", "Bearer two")], 401),
        (&[("x-api-key", "one"), ("authorization", "Bearer wrong")], 401),
        (&[("x-api-key", "one"), ("x-api-key", "two")], 401),
        (&[("authorization", "Bearer one"), ("authorization", "Bearer two")], 401),
        // A proxy's own password is no key of ours.
        (&[("x-api-key", "one"), ("authorization", "Basic abc")], 200),
    ] {
        let answer = server.send("GET", "/v1/models", headers, b"");
        assert_eq!(answer.status, status, "{headers:?}");
        if status == 401 {
            assert_eq!(answer.error().3, json!("invalid_api_key"), "{headers:?}");
        }
    }
    let both = [("x-api-key", "one"), ("authorization", "Bearer two")];
    assert!(server.send("GET", "/v1/models", &both, b"").error().1.contains("several keys"));
    assert_eq!(server.send("GET", "/admin/adapters", &[("x-api-key", "boss")], b"").status, 200);
    assert_eq!(server.send("GET", "/admin/adapters", &[("x-api-key", "one")], b"").status, 401);
}

#[test]
fn request_ids_come_back_or_are_refused() {
    let server = Server::start();
    let long = "i".repeat(512);
    for id in ["mine", "req_1/2:3;{}", &long] {
        for path in ["/v1/models", "/nowhere", "/admin/adapters/gone"] {
            assert_eq!(server.send("GET", path, &[("x-request-id", id)], b"").headers["x-request-id"], id, "{path}");
        }
    }
    let stream = json!({"prompt": ".", "stream": true}).to_string();
    let answer = server.send("POST", "/v1/completions", &[("x-request-id", "mine")], stream.as_bytes());
    assert_eq!((answer.status, answer.headers["x-request-id"].as_str()), (200, "mine"));
    for id in ["", "two words", "tab\there", "ünicode", &"i".repeat(513)] {
        let answer = server.send("GET", "/v1/models", &[("x-request-id", id)], b"");
        let (status, message, _, code) = answer.error();
        assert_eq!((status, code), (400, json!("invalid_request_id")), "{id:?}");
        assert!(message.contains("`x-request-id` must have 1 to 512"), "{message}");
        // The refusal has an id of the server's.
        assert_eq!(answer.headers["x-request-id"].len(), 36, "{id:?}");
    }
}

#[test]
fn wrong_routes_name_the_right_one() {
    let server = Server::start();
    for (method, path, right) in [
        ("POST", "/completions", "/v1/completions"),
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/completions/", "/v1/completions"),
        ("POST", "/v1/engines/davinci/completions", "/v1/completions"),
        ("GET", "/models", "/v1/models"),
        ("GET", "/models/org/base", "/v1/models/org/base"),
        ("GET", "/v1/v1/files", "/v1/files"),
        ("GET", "/fine_tuning/jobs", "/v1/fine_tuning/jobs"),
        ("POST", "/load_lora_adapter", "/v1/load_lora_adapter"),
        ("POST", "/v1/tokenize", "/tokenize"),
        ("GET", "/v1/lora-adapters", "/lora-adapters"),
        ("GET", "/v1/health", "/health"),
        ("GET", "/healthz", "/health"),
        ("GET", "/livez", "/live"),
        ("GET", "/readyz", "/ready"),
        ("POST", "/api/generate", "/v1/completions"),
        ("POST", "/api/chat", "/v1/chat/completions"),
        ("POST", "/embeddings", "/v1/embeddings"),
        ("POST", "/api/embed", "/v1/embeddings"),
        ("POST", "/embedding", "/v1/embeddings"),
        ("GET", "/api/tags", "/v1/models"),
        ("GET", "/api/version", "/version"),
        ("GET", "/slots", "/metrics"),
        ("GET", "/props", "/tokenizer_info"),
        ("POST", "/v1/detokenize", "/detokenize"),
    ] {
        let (status, message, _, code) = server.send(method, path, &[], b"{}").error();
        assert_eq!((status, code), (404, json!("unknown_route")), "{path}");
        assert!(message.ends_with(&format!("{method} {path}: use {right}")), "{message}");
        let answer = server.send(method, right, &[], b"{}");
        assert!(!answer.text.contains("unknown_route") && answer.status != 405, "{method} {right}: {}", answer.text);
    }
    assert!(server.get("/nowhere").error().1.ends_with("no such route: GET /nowhere"));
}

/// An HTTP/2 client that knows before that the server speaks it.
async fn http2(server: &Server) -> http2::SendRequest<Full<Bytes>> {
    let stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let (client, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    client
}

fn request(server: &Server, method: &str, path: &str, body: Option<Value>) -> Request<Full<Bytes>> {
    Request::builder()
        .method(method)
        .uri(format!("http://{}{path}", server.address))
        .header("accept-encoding", "gzip, br")
        .header("x-request-id", "mine")
        .body(Full::from(body.map_or(String::new(), |body| body.to_string())))
        .unwrap()
}

async fn text(response: hyper::Response<Incoming>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn http2_without_tls() {
    let server = Server::start();
    runtime().block_on(async {
        let mut client = http2(&server).await;
        let models = client.send_request(request(&server, "GET", "/v1/models", None)).await.unwrap();
        assert_eq!((models.status().as_u16(), models.version()), (200, hyper::Version::HTTP_2));
        assert_eq!(models.headers()["x-request-id"], "mine");
        assert!(text(models).await.contains("org/base"));
        let head = client.send_request(request(&server, "HEAD", "/health", None)).await.unwrap();
        assert_eq!((head.status().as_u16(), text(head).await.as_str()), (200, ""));
        let wrong = client.send_request(request(&server, "GET", "/v1/completions", None)).await.unwrap();
        assert_eq!((wrong.status().as_u16(), &wrong.headers()["allow"]), (405, &"POST".parse().unwrap()));

        // Many streams of one connection, each with its own adapter.
        let answers = (0..24).map(|i| {
            let (adapter, start) = [(Value::Null, "a"), (json!("a"), "A"), (json!("b"), "A")][i % 3].clone();
            let body = json!({"prompt": ".", "max_tokens": 5, "stream": true, "adapter": adapter});
            let answer = client.send_request(request(&server, "POST", "/v1/completions", Some(body)));
            async move { (answer.await.unwrap(), start) }
        });
        for (answer, start) in futures::future::join_all(answers).await {
            assert_eq!(
                (answer.status().as_u16(), &answer.headers()["content-type"]),
                (200, &"text/event-stream".parse().unwrap())
            );
            assert!(!answer.headers().contains_key("content-encoding"), "a stream is not compressed");
            let text = text(answer).await;
            assert!(text.contains(&format!("\"text\":\"{start}\"")) && text.ends_with("data: [DONE]\n\n"), "{text}");
        }
    });
    // The same port speaks HTTP/1.
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn the_streams_of_a_connection_are_limited() {
    const MAX_CONCURRENT_STREAMS: u16 = 3;
    let server = Server::start();
    let mut stream = TcpStream::connect(server.address).unwrap();
    // The preface and empty settings.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut head = [0; 9];
    stream.read_exact(&mut head).unwrap();
    assert_eq!(head[3], 4, "settings come first");
    let mut settings = vec![0; usize::from(head[2])];
    stream.read_exact(&mut settings).unwrap();
    let limit = settings.chunks_exact(6).find(|s| u16::from_be_bytes([s[0], s[1]]) == MAX_CONCURRENT_STREAMS);
    let limit = limit.map(|s| u32::from_be_bytes([s[2], s[3], s[4], s[5]]));
    assert!(limit.is_some_and(|limit| (16..=256).contains(&limit)), "{limit:?}");
}

#[test]
fn a_stream_over_http2_finishes_while_the_server_stops() {
    let mut server = Server::with(Options { drain_timeout: Duration::from_secs(60), ..Options::default() });
    let runtime = runtime();
    server.gate.set(true);
    let body = json!({"prompt": ".", "max_tokens": 20, "stream": true});
    let (mut client, answer) = runtime.block_on(async {
        let mut client = http2(&server).await;
        let answer = client.send_request(request(&server, "POST", "/v1/completions", Some(body)));
        (client, tokio::spawn(answer))
    });
    eventually("it runs", || server.gate.holds_a_step());
    server.stop();
    eventually("new connections are refused", || TcpStream::connect(server.address).is_err());
    server.gate.set(false);
    let text = runtime.block_on(async { text(answer.await.unwrap().unwrap()).await });
    assert!(text.contains("\"text\":\"t\"") && text.ends_with("data: [DONE]\n\n"), "{text}");
    let start = Instant::now();
    server.join().expect("a clean end");
    assert!(start.elapsed() < Duration::from_secs(30), "the open connection does not hold the server");
    assert!(runtime.block_on(client.send_request(request(&server, "GET", "/health", None))).is_err());
}

/// Reads one answer with a `content-length`, and leaves the connection open.
fn read_one(stream: &mut BufReader<TcpStream>) -> (String, Vec<u8>) {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(stream.read_line(&mut head).expect("a line") > 0, "the connection has closed after {head:?}");
    }
    let length = head.to_lowercase().lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.expect("a length")];
    stream.read_exact(&mut body).expect("the body");
    (head, body)
}

/// A body that no handler reads must not close the connection unseen: the client's next request on it would fail.
#[test]
fn a_refused_request_leaves_its_connection_usable() {
    let server = Server::with(Options { api_keys: vec!["k".into()], ..Options::default() });
    let stream = TcpStream::connect(server.address).unwrap();
    stream.set_nodelay(true).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    for round in 0..30 {
        for (path, status) in [("/nope", "404"), ("/v1/completions", "401"), ("/live", "405")] {
            let body = "x".repeat(20_000);
            let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).unwrap();
            // The body comes later, as from a client that writes it on its own.
            std::thread::sleep(Duration::from_millis(2));
            stream.write_all(body.as_bytes()).unwrap();
            let (head, _) = read_one(&mut reader);
            assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{round} {path}: {head}");
        }
    }
    // A body that is too long to be thrown away ends the connection, and the answer says so.
    stream.write_all(b"POST /nope HTTP/1.1\r\nhost: x\r\ncontent-length: 10000000\r\n\r\n").unwrap();
    stream.write_all(&[b'x'; 300_000]).unwrap();
    assert!(read_one(&mut reader).0.to_lowercase().contains("connection: close"));
}

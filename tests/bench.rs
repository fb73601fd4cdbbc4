//! The load generator against a fake server with known behaviour, and the benchmarks against the real server and engine.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use futures::{StreamExt, stream};
use quiver::bench::client::Client;
use quiver::bench::load::{self, LoadRun, RequestRecord, RunLimits};
use quiver::bench::report::{self, BenchReport};
use quiver::bench::stats::{Quantiles, Summary, jain};
use quiver::bench::target::{AdapterField, Observed, TargetServer};
use quiver::bench::traffic::{Arrivals, Lengths, PlannedRequest, Popularity, Prompts, Traffic};
use quiver::bench::verdict::{self, Verdict};
use serde_json::{Value, json};
use tokio::sync::watch;

fn traffic(arrivals: Arrivals) -> Traffic {
    Traffic {
        arrivals,
        input: Lengths::Fixed(8),
        output: Lengths::Fixed(5),
        prompts: Prompts::Tokens(100),
        adapters: 0,
        popularity: Popularity::Uniform,
        seed: 7,
    }
}

fn plan(traffic: &Traffic, count: usize) -> Vec<PlannedRequest> {
    traffic.plan().expect("valid traffic").take(count).collect()
}

#[test]
fn gaps_have_the_configured_rate_and_variation() {
    for cv in [0.0, 0.5, 1.0, 2.0, 4.0] {
        let due: Vec<f64> =
            plan(&traffic(Arrivals::Open { rate: 20.0, cv }), 200_000).iter().map(|p| p.due.as_secs_f64()).collect();
        let gaps: Vec<f64> = due.windows(2).map(|w| w[1] - w[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((mean * 20.0 - 1.0).abs() < 0.03, "cv {cv}: mean {mean}");
        assert!((deviation / mean - cv).abs() < 0.05 * cv.max(0.01), "cv {cv}: deviation {deviation}");
        if cv == 1.0 {
            // Memoryless: the share of gaps above the mean is that of an exponential distribution.
            let beyond = gaps.iter().filter(|g| **g > mean).count() as f64 / gaps.len() as f64;
            assert!((beyond - (-1.0f64).exp()).abs() < 0.01, "{beyond}");
        }
    }
    assert_eq!(
        plan(&traffic(Arrivals::Open { rate: 3.0, cv: 2.0 }), 50),
        plan(&traffic(Arrivals::Open { rate: 3.0, cv: 2.0 }), 50)
    );
}

#[test]
fn adapters_have_the_configured_popularity() {
    const N: usize = 10;
    let shares = |popularity| {
        let traffic = Traffic { adapters: N, popularity, ..traffic(Arrivals::Closed { clients: 1 }) };
        let mut counts = [0.0; N];
        plan(&traffic, 100_000).iter().for_each(|p| counts[p.adapter.expect("an adapter")] += 1e-5);
        counts
    };
    let close = |popularity, expected: [f64; N]| {
        let found = shares(popularity);
        assert!(
            found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.01),
            "{popularity:?}: {found:?} {expected:?}"
        );
    };
    let normalised = |weight: fn(f64) -> f64| {
        let weights: [f64; N] = std::array::from_fn(|i| weight(i as f64));
        weights.map(|w| w / weights.iter().sum::<f64>())
    };
    close(Popularity::Uniform, [0.1; N]);
    close(Popularity::Power(1.0), [0.1; N]);
    close(Popularity::Zipf(1.2), normalised(|i| (i + 1.0).powf(-1.2)));
    close(Popularity::Geometric(1.5), normalised(|i| 1.5f64.powf(-i)));
    // The share of numpy.random.power(0.3) below 0.1.
    assert!((shares(Popularity::Power(0.3))[0] - 0.1f64.powf(0.3)).abs() < 0.01);
    assert_eq!(shares(Popularity::One)[1..], [0.0; N - 1]);
    let distinct =
        Traffic { adapters: 3, popularity: Popularity::Distinct, ..traffic(Arrivals::Closed { clients: 1 }) };
    assert_eq!(plan(&distinct, 5).iter().map(|p| p.adapter).collect::<Vec<_>>(), [0, 1, 2, 0, 1].map(Some));
    for wrong in ["zipf", "zipf:0", "zipf:x", "uniform:1", "power:-1", "many"] {
        assert!(wrong.parse::<Popularity>().is_err(), "{wrong}");
    }
}

#[test]
fn lengths_have_the_configured_distribution() {
    let lengths = |text: &str| {
        let output = text.parse().expect(text);
        let mut drawn: Vec<usize> = plan(&Traffic { output, ..traffic(Arrivals::Closed { clients: 1 }) }, 20_000)
            .iter()
            .map(|p| p.output)
            .collect();
        drawn.sort_unstable();
        drawn
    };
    assert!(lengths("17").iter().all(|n| *n == 17));
    let uniform = lengths("8..512");
    assert_eq!((uniform[0], uniform[19_999]), (8, 512));
    assert!((uniform.iter().sum::<usize>() as f64 / 20_000.0 - 260.0).abs() < 5.0);
    let skewed = lengths("lognormal:100:1:400");
    assert!(skewed[10_000].abs_diff(100) < 5 && skewed[0] >= 1 && skewed[19_999] == 400);
    // One standard deviation of the logarithm: 16% are above e times the median.
    let beyond = skewed.iter().filter(|n| **n > 272).count();
    assert!(beyond.abs_diff(3173) < 300, "{beyond}");
    for wrong in ["0", "", "9..8", "0..4", "lognormal:1:2", "lognormal:1:-2:5", "x"] {
        assert!(wrong.parse::<Lengths>().is_err(), "{wrong}");
    }
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let turns =
        |a: &str, b: &str| json!({"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]});
    let reply = "four".repeat(9);
    let list = json!([turns("What is a lantern?", &reply), turns("x", &reply), {"conversations": []}]);
    std::fs::write(file.path(), list.to_string()).expect("it can be written");
    let prompts = Prompts::share_gpt(file.path()).expect("one conversation fits");
    let planned = plan(&Traffic { prompts, ..traffic(Arrivals::Closed { clients: 1 }) }, 1);
    assert_eq!((&planned[0].prompt, planned[0].output), (&json!("What is a lantern?"), 9));
    std::fs::write(file.path(), "[]").expect("it can be written");
    assert!(Prompts::share_gpt(file.path()).is_err());
}

#[test]
fn statistics_follow_their_definitions() {
    assert_eq!(jain(&[3.0, 3.0, 3.0]), 1.0);
    assert_eq!(jain(&[4.0, 0.0, 0.0, 0.0]), 0.25);
    assert!((jain(&[1.0, 2.0, 3.0]) - 36.0 / 42.0).abs() < 1e-12);
    assert_eq!(jain(&[]), 1.0);
    let q = Quantiles::of((1..=200).rev().map(f64::from));
    assert_eq!((q.count, q.mean, q.p50, q.p90, q.p99, q.max), (200, 100.5, 100.0, 180.0, 198.0, 200.0));
    assert_eq!(Quantiles::of([]), Quantiles::default());
}

// --- A fake server ---

/// Behaviour of a fake server.
#[derive(Clone, Default)]
struct FakeBehaviour {
    /// Time between tokens.
    gap: Duration,
    /// Start, after the first request, and length of a time without answers.
    stall: Option<(Duration, Duration)>,
    /// Answers to requests, in turn and repeated: `ok`, a status, or a kind of failure.
    answers: &'static [&'static str],
}

struct Fake {
    behaviour: FakeBehaviour,
    start: std::sync::OnceLock<Instant>,
    bodies: std::sync::Mutex<Vec<Value>>,
}

async fn complete(State(fake): State<Arc<Fake>>, body: String) -> Response {
    let start = *fake.start.get_or_init(Instant::now);
    let body: Value = serde_json::from_str(&body).expect("JSON");
    let number = {
        let mut bodies = fake.bodies.lock().expect("no panic");
        bodies.push(body.clone());
        bodies.len() - 1
    };
    if let Some((from, length)) = fake.behaviour.stall {
        let now = start.elapsed();
        if now >= from && now < from + length {
            tokio::time::sleep(from + length - now).await;
        }
    }
    let answers = fake.behaviour.answers;
    let answer = if answers.is_empty() { "ok" } else { answers[number % answers.len()] };
    if let Ok(status) = answer.parse::<u16>() {
        return (StatusCode::from_u16(status).expect("a status"), [("retry-after", "1")]).into_response();
    }
    let tokens = body["max_tokens"].as_u64().expect("max_tokens");
    let gap = fake.behaviour.gap;
    let chunks = stream::iter(0..tokens).then(move |_| async move {
        tokio::time::sleep(gap).await;
        json!({"choices": [{"text": " a"}]}).to_string()
    });
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": tokens}}).to_string();
    let tail = match answer {
        "cut" => vec![],
        "error" => vec![json!({"error": {"message": "no"}}).to_string()],
        _ => vec![usage, "[DONE]".to_owned()],
    };
    Sse::new(
        chunks.chain(stream::iter(tail)).map(|data| Ok::<_, std::convert::Infallible>(Event::default().data(data))),
    )
    .into_response()
}

/// Starts a fake server on threads of its own, so that its timing does not depend on the test.
fn fake(behaviour: FakeBehaviour) -> (TargetServer, Arc<Fake>) {
    let fake = Arc::new(Fake { behaviour, start: Default::default(), bodies: Default::default() });
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.set_nonblocking(true).expect("it can be");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let router = Router::new()
        .route("/v1/completions", post(complete))
        .route("/health", get(|| async {}))
        .with_state(fake.clone());
    std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            let listener = listener.tap_io(|connection| connection.set_nodelay(true).expect("it can be set"));
            axum::serve(listener, router).await
        })
    });
    let target = TargetServer {
        client: Client::new(&url, None, Duration::from_secs(20)).expect("a client"),
        model: "fake".into(),
        adapters: vec!["a".into(), "b".into()],
        field: AdapterField::Model,
        chat: false,
        extra: json!({"temperature": 0}).as_object().expect("an object").clone(),
        pid: None,
    };
    (target, fake)
}

/// Runs traffic on a single-threaded runtime.
fn measure(
    target: &TargetServer,
    traffic: &Traffic,
    requests: Option<usize>,
    duration: Option<f64>,
) -> (LoadRun, Summary) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (_keep, stop) = watch::channel(false);
    let limits = RunLimits { requests, duration: duration.map(Duration::from_secs_f64) };
    let run = runtime.block_on(load::run(target, traffic, limits, stop, "test")).expect("it runs");
    let summary = Summary::of(&run, traffic.arrivals, 6.0);
    (run, summary)
}

#[test]
fn replies_are_timed_and_counted() {
    let (target, fake) = fake(FakeBehaviour { gap: Duration::from_millis(20), ..FakeBehaviour::default() });
    let traffic = Traffic { adapters: 2, popularity: Popularity::Distinct, ..traffic(Arrivals::Closed { clients: 3 }) };
    let (run, s) = measure(&target, &traffic, Some(12), None);
    assert_eq!((s.requests, s.completed, s.failures(), s.unfinished), (12, 12, 0, 0));
    assert_eq!((s.first_ms.count, s.between_ms.count, s.whole_ms.count), (12, 12 * 4, 12));
    assert!(run.records.iter().all(|r| (r.input, r.output) == (8, 5)));
    assert!((s.output_per_s * s.seconds - 60.0).abs() < 1e-6 && (s.input_per_s * s.seconds - 96.0).abs() < 1e-6);
    // Sleeps last at least as long as requested; the rest depends on the machine.
    assert!(s.first_ms.p50 >= 20.0 && s.between_ms.p50 >= 19.0 && s.whole_ms.p50 >= 100.0, "{s:?}");
    assert!(s.token_ms.p50 >= 19.0 && s.whole_ms.p50 < 2000.0, "{s:?}");
    assert_eq!((s.slo_attained, s.fairness.adapters.len(), s.offered_per_s), (1.0, 2, None));
    assert!((s.fairness.jain_throughput - 1.0).abs() < 1e-9);
    let bodies = fake.bodies.lock().expect("no panic");
    let with = |name: &str| bodies.iter().filter(|b| b["model"] == name).count();
    assert_eq!((with("a"), with("b")), (6, 6));
    assert!(bodies.iter().all(|b| b["stream"] == true && b["temperature"] == 0 && b["max_tokens"] == 5));
    for (field, key, value) in
        [(AdapterField::Adapter, "adapter", json!("b")), (AdapterField::Lora, "lora", json!([{"id": 1, "scale": 1.0}]))]
    {
        let planned = PlannedRequest { due: Duration::ZERO, prompt: json!([1]), output: 1, adapter: Some(1) };
        let body: Value =
            serde_json::from_slice(&TargetServer { field, ..target.clone() }.body(&planned)).expect("JSON");
        assert_eq!((&body["model"], &body[key]), (&json!("fake"), &value));
    }
}

#[test]
fn failures_are_counted_by_kind() {
    let (target, _) =
        fake(FakeBehaviour { answers: &["ok", "429", "500", "cut", "error", "ok"], ..FakeBehaviour::default() });
    let (run, s) = measure(&target, &traffic(Arrivals::Closed { clients: 12 }), Some(12), None);
    let expected = [("http 429", 2), ("http 500", 2), ("broken", 2), ("error", 2)];
    assert_eq!(s.failed, BTreeMap::from(expected.map(|(kind, n)| (kind.to_owned(), n))));
    assert_eq!((s.completed, s.first_ms.count), (4, 4));
    assert!((s.slo_attained - 4.0 / 12.0).abs() < 1e-9, "failed requests did not meet the objective");
    assert!(
        run.records.iter().filter(|r| r.failure.as_deref() == Some("http 429")).all(|r| r.retry_after == Some(1.0))
    );
    let gone = TargetServer {
        client: Client::new("http://127.0.0.1:1", None, Duration::from_secs(1)).expect("a client"),
        ..target
    };
    let (_, s) = measure(&gone, &traffic(Arrivals::Closed { clients: 2 }), Some(2), None);
    assert_eq!(s.failed, BTreeMap::from([("connect".to_owned(), 2)]));
    assert!(Client::new("https://127.0.0.1", None, Duration::from_secs(1)).is_err());
}

#[test]
fn a_stall_counts_for_every_request_that_was_due_in_it() {
    let stall = Some((Duration::from_millis(500), Duration::from_millis(1500)));
    let (target, _) = fake(FakeBehaviour { stall, ..FakeBehaviour::default() });
    let (_, open) = measure(&target, &traffic(Arrivals::Open { rate: 50.0, cv: 0.0 }), None, Some(2.5));
    // 60% of the requests were due during the stall, a tenth of them in its first fifth.
    assert!(open.requests >= 120 && open.failures() == 0, "{open:?}");
    assert!(open.whole_ms.p90 > 1000.0 && open.whole_ms.p50 > 50.0, "{:?}", open.whole_ms);
    // A closed-loop client measures the stall only once.
    let (target, _) = fake(FakeBehaviour { stall, ..FakeBehaviour::default() });
    let (_, closed) = measure(&target, &traffic(Arrivals::Closed { clients: 1 }), None, Some(2.5));
    assert!(closed.whole_ms.p90 < 500.0 && closed.whole_ms.max > 1000.0, "{:?}", closed.whole_ms);
}

#[test]
fn a_late_generator_warns_and_counts_its_delay() {
    let (target, _) = fake(FakeBehaviour::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let traffic = traffic(Arrivals::Open { rate: 100.0, cv: 0.0 });
    let run = runtime.block_on(async {
        // The generator's only thread is blocked for half of the time.
        tokio::spawn(async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            std::thread::sleep(Duration::from_millis(500));
        });
        let (_keep, stop) = watch::channel(false);
        let limits = RunLimits { requests: Some(100), duration: None };
        load::run(&target, &traffic, limits, stop, "test").await.expect("it runs")
    });
    let s = Summary::of(&run, traffic.arrivals, 6.0);
    assert!(s.lag_ms.p99 > 300.0, "{:?}", s.lag_ms);
    assert!(s.warning.as_ref().is_some_and(|w| w.contains("late")), "{:?}", s.warning);
    assert!(run.records.iter().all(|r| r.end >= r.lag), "latency counts from the time a request was due");
}

#[test]
fn an_interrupted_run_keeps_its_records() {
    let (target, _) = fake(FakeBehaviour {
        stall: Some((Duration::from_millis(300), Duration::from_secs(30))),
        ..FakeBehaviour::default()
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let traffic = traffic(Arrivals::Open { rate: 50.0, cv: 0.0 });
    let run = runtime.block_on(async {
        let (sender, stop) = watch::channel(false);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(800)).await;
            sender.send_replace(true);
            std::future::pending::<()>().await;
        });
        let limits = RunLimits { requests: None, duration: Some(Duration::from_secs(60)) };
        load::run(&target, &traffic, limits, stop, "test").await.expect("it runs")
    });
    let s = Summary::of(&run, traffic.arrivals, 6.0);
    assert!(s.interrupted && s.completed > 0 && s.unfinished > 0, "{s:?}");
    assert_eq!(s.requests, s.completed + s.unfinished);
}

// --- Verdicts ---

/// Verdict of a 9-second overload at 10 requests per second: every other request is refused with `refusal`, the others have their
/// first token after `first(due)`. `memory` is in MiB.
fn overloaded(first: fn(f64) -> f64, refusal: &str, retry_after: Option<f64>, memory: [u64; 9]) -> Verdict {
    let record = |i: usize| {
        let due = i as f64 / 10.0;
        let refused = i.is_multiple_of(2);
        RequestRecord {
            due,
            lag: 0.0,
            first: (!refused).then_some(first(due)),
            end: first(due),
            gaps: Vec::new(),
            input: 8,
            output: 5,
            adapter: None,
            failure: refused.then(|| refusal.to_owned()),
            retry_after,
        }
    };
    let run = LoadRun {
        records: (0..90).map(record).collect(),
        unfinished: 0,
        seconds: 9.0,
        generator_cpus: 0.0,
        server: [Observed::default(); 2],
        memory: memory.map(|mib| mib << 20).to_vec(),
        interrupted: false,
    };
    let summary = Summary::of(&run, Arrivals::Open { rate: 10.0, cv: 1.0 }, 6.0);
    verdict::overload(&run, &summary, 5.0)
}

#[test]
fn overload_is_judged() {
    // A cache that fills, then steady use.
    let full = [200, 400, 900, 1000, 1010, 990, 1000, 1020, 1000];
    let verdict = overloaded(|_| 2.0, "http 429", Some(1.0), full);
    assert!(verdict.faults.is_empty(), "{verdict:?}");
    assert!(verdict.facts.iter().any(|f| f.contains("MiB: 200 ") && f.ends_with(" 1000")), "{verdict:?}");
    for (verdict, fault) in [
        (overloaded(|_| 2.0, "http 429", None, full), "without Retry-After"),
        (overloaded(|_| 2.0, "http 500", Some(1.0), full), "failed otherwise"),
        (overloaded(|_| 2.0, "http 500", Some(1.0), full), "nothing was refused"),
        (overloaded(|due| due, "http 429", Some(1.0), full), "latency still rises"),
        (
            overloaded(|_| 2.0, "http 429", Some(1.0), [200, 400, 900, 1000, 1010, 1050, 1080, 1100, 1150]),
            "memory grew from 1050 MiB to 1150",
        ),
    ] {
        assert!(verdict.faults.iter().any(|f| f.contains(fault)), "{fault}: {verdict:?}");
    }
}

// --- The real server and engine ---

#[test]
fn the_real_server_is_started_measured_soaked_and_stopped() {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let url = format!("http://127.0.0.1:{port}");
    let quiver = env!("CARGO_BIN_EXE_quiver");
    let adapters = concat!(env!("CARGO_MANIFEST_DIR"), "/adapters");
    const KEY: &str = "sk-bench-1234";
    let start =
        format!("{quiver} serve --port {port} --adapters {adapters} --max-waiting 4 --max-running 2 --api-key {KEY}");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let bench = |args: &[&str], out: &str| {
        let output = Command::new(quiver)
            .args([
                "bench",
                "serve",
                "--url",
                &url,
                "--api-key",
                KEY,
                "--start",
                &start,
                "--input",
                "16",
                "--output",
                "8",
                "--out",
            ])
            .arg(dir.path().join(out))
            .args(args)
            .output()
            .expect("it runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {said}");
        assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err(), "the server still runs");
        let written = std::fs::read_to_string(dir.path().join(out)).expect("a report");
        assert!(!written.contains(KEY) && !said.contains(KEY), "a report holds no key");
        BenchReport::read(&dir.path().join(out)).expect("a report")
    };
    let page = dir.path().join("page.html");
    let report = bench(
        &[
            "--concurrency",
            "1,3",
            "--requests",
            "9",
            "--adapters",
            "3",
            "--popularity",
            "distinct",
            "--page",
            page.to_str().expect("UTF-8"),
        ],
        "closed.json",
    );
    assert_eq!((report.server["server"].as_str(), report.runs.len()), (Some("quiver"), 2));
    for run in &report.runs {
        let s = &run.summary;
        assert_eq!((s.requests, s.completed, run.records.len()), (9, 9, 9), "{:?}", s.failed);
        assert!(run.records.iter().all(|r| (r.input, r.output) == (16, 8)), "{:?}", run.records);
        assert_eq!((run.adapters.len(), s.fairness.adapters.len()), (3, 3));
        assert!(s.adapter_misses.is_some() && s.resident_bytes[1].is_some_and(|bytes| bytes > 50 << 20));
    }
    let html = std::fs::read_to_string(&page).expect("a page");
    // Throughput and latency over the number of clients, and two charts over time for each run.
    assert_eq!(html.matches("<svg").count(), 6);
    assert_eq!(report::charts(&[report]).len(), 2);

    let report = bench(&["--grid", "soak", "--duration", "5", "--concurrency", "3"], "soak.json");
    let verdict = report.verdict.expect("a verdict");
    assert!(verdict.faults.is_empty() && verdict.facts[0].contains("replies checked"), "{verdict:?}");
}

#[test]
fn the_engine_is_measured_by_mix_rank_and_batch() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let out = dir.path().join("engine.json");
    let bench = |rank: &str| {
        Command::new(env!("CARGO_BIN_EXE_quiver"))
            .args([
                "bench", "engine", "--device", "cpu", "--input", "4", "--output", "2", "--repeat", "1", "--batch",
                "1,2",
            ])
            .args(["--adapters", concat!(env!("CARGO_MANIFEST_DIR"), "/adapters"), "--mix", "none,distinct"])
            .args(["--registered", "2", "--rank", rank, "--out"])
            .arg(&out)
            .output()
            .expect("it runs")
    };
    let output = bench("8");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(&out).expect("rows")).expect("JSON");
    let keys =
        |row: &Value| (row["adapters"].clone(), row["rank"].clone(), row["registered"].clone(), row["batch"].clone());
    let expected = [
        ("none", Value::Null, 0, 1),
        ("none", Value::Null, 0, 2),
        ("distinct", json!(8), 2, 1),
        ("distinct", json!(8), 2, 2),
    ];
    assert_eq!(
        rows.iter().map(keys).collect::<Vec<_>>(),
        expected.map(|(mix, rank, registered, batch)| (json!(mix), rank, json!(registered), json!(batch)))
    );
    assert!(rows.iter().all(|row| row["bandwidth"].as_f64() > Some(0.0)), "{rows:?}");
    let bytes = |i: usize| rows[i]["step_bytes"][0].as_f64().expect("bytes");
    // The project's adapters have the same size; two sequences read both.
    let one = bytes(2) - bytes(0);
    assert!(one > 4e6 && (bytes(3) - bytes(1) - 2.0 * one).abs() < 1.0, "{rows:?}");
    // A second sequence adds only its keys and values: 30 layers of 2 x 192 numbers per token, 5.5 tokens on average.
    let kept = bytes(1) - bytes(0);
    assert!((kept - 30.0 * 384.0 * 4.0 * 5.5).abs() < 1.0, "{kept}");
    let refused = bench("9");
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("of rank 9"), "{refused:?}");
}

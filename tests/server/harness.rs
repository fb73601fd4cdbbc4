//! A server on a real socket with the real engine, on a fake model that writes the alphabet.
//!
//! Its tokens are bytes. After a byte that is no letter it writes `a`, goes on to `z` and ends. Under an adapter it writes
//! capitals, under a weighted sum digits, and after `#` it writes `é` for ever, a byte a step. A step with `?` fails. Hidden
//! states are the token, its position and the number of adapters, then zeros.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use quiver::adapter::registry::{LoadOptions, Registry, RegistryConfig};
use quiver::adapter::tiers::Residency;
use quiver::adapter::{Lease, ServedBase};
use quiver::arch::{ModelConfig, RopeScaling};
use quiver::engine::request::SamplingParams;
use quiver::engine::{Engine, EngineConfig, InFlightStep, Runner};
use quiver::finetune::context::JobContext;
use quiver::finetune::jobs::Jobs;
use quiver::finetune::store::Store;
use quiver::hub::{ModelFiles, ModelFormat};
use quiver::model::decoder::StepOutput;
use quiver::ops::batch::Batch;
use quiver::runtime::{BaseInfo, Runtime};
use quiver::server::{App, HttpConfig, Serving, SharedApp};
use quiver::text::codec::TextCodec;
use quiver::text::grammar::GrammarCompiler;
use quiver::{Error, Result};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::trainer;

pub const BASE: &str = "org/base";
pub const EOS: u32 = 257;
const VOCAB: usize = 258;
/// Width of a hidden state.
pub const HIDDEN: usize = 8;

/// Message of the internal errors of the fake model and the fake trainer.
pub const BROKEN: &str = "row 3 of /secret/weights does not fit";

/// Holds steps back while it is closed.
#[derive(Default)]
pub struct Gate {
    closed: Mutex<bool>,
    moved: Condvar,
    holds: AtomicBool,
}

impl Gate {
    pub fn set(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.moved.notify_all();
    }

    /// Whether a step is held back.
    pub fn holds_a_step(&self) -> bool {
        self.holds.load(Relaxed)
    }

    fn pass(&self) {
        let closed = self.closed.lock().unwrap();
        self.holds.store(*closed, Relaxed);
        drop(self.moved.wait_while(closed, |closed| *closed).unwrap());
        self.holds.store(false, Relaxed);
    }
}

struct Alphabet {
    gate: Arc<Gate>,
    slots: HashMap<String, u32>,
}

fn next(token: u32, terms: usize) -> u32 {
    const E_ACUTE: [u32; 2] = [0xC3, 0xA9];
    let letters = [b'a'..=b'z', b'A'..=b'Z', b'0'..=b'9'][terms.min(2)].clone();
    match u8::try_from(token) {
        Ok(b'#') => E_ACUTE[0],
        Ok(0xC3) => E_ACUTE[1],
        Ok(0xA9) => E_ACUTE[0],
        Ok(last) if last == *letters.end() => EOS,
        Ok(letter) if letters.contains(&letter) => u32::from(letter) + 1,
        _ => u32::from(*letters.start()),
    }
}

impl Runner for Alphabet {
    fn acquire(&mut self, lease: &Lease) -> Residency {
        let free = self.slots.len() as u32;
        Residency::Ready(*self.slots.entry(lease.id.clone()).or_insert(free))
    }

    fn release(&mut self, _slot: u32) {}

    fn launch(&mut self, batch: &Batch) -> Result<InFlightStep> {
        self.gate.pass();
        if batch.tokens.contains(&u32::from(b'?')) {
            return Err(Error::internal(BROKEN));
        }
        let terms = |row: u32| {
            batch.segments.iter().find(|s| s.rows.contains(&(row as usize))).map_or(0, |segment| segment.terms.len())
        };
        let mut logits = vec![0f32; batch.logit_rows.len() * VOCAB];
        for (out, &row) in logits.chunks_exact_mut(VOCAB).zip(&batch.logit_rows) {
            out[next(batch.tokens[row as usize], terms(row)) as usize] = 40.0;
        }
        let logits = Tensor::from_vec(logits, (batch.logit_rows.len(), VOCAB), &Device::Cpu)?;
        let mut hidden = vec![0f32; batch.hidden_rows.len() * HIDDEN];
        for (out, &row) in hidden.chunks_exact_mut(HIDDEN).zip(&batch.hidden_rows) {
            let of_row = [batch.tokens[row as usize], batch.positions[row as usize], terms(row) as u32];
            out.iter_mut().zip(of_row).for_each(|(out, value)| *out = value as f32);
        }
        let hidden = Tensor::from_vec(hidden, (batch.hidden_rows.len(), HIDDEN), &Device::Cpu)?;
        Ok(InFlightStep::new(StepOutput { logits, hidden: Some(hidden) }))
    }

    fn collect(&mut self, step: InFlightStep) -> Result<StepOutput> {
        Ok(step.into_output())
    }
}

/// Settings that tests change.
pub struct Options {
    pub api_keys: Vec<String>,
    pub admin_key: Option<String>,
    pub cors_origins: Vec<String>,
    pub max_body: usize,
    pub max_running: usize,
    pub max_waiting: usize,
    pub max_model_len: usize,
    pub drain_timeout: Duration,
    pub loaded: bool,
    /// Where files and jobs are kept, for tests of restarts.
    pub state: Option<PathBuf>,
    /// Whether [`Server::dir`] is the adapters directory.
    pub adapters_dir: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            api_keys: vec![],
            admin_key: None,
            cors_origins: vec![],
            max_body: 1 << 20,
            max_running: 8,
            max_waiting: 64,
            max_model_len: 256,
            drain_timeout: Duration::from_secs(5),
            loaded: true,
            state: None,
            adapters_dir: false,
        }
    }
}

pub struct Server {
    pub address: SocketAddr,
    pub gate: Arc<Gate>,
    pub app: SharedApp,
    pub engine: Engine,
    /// Holds `a`, `b` (loaded) and `spare` (not loaded).
    pub dir: tempfile::TempDir,
    serving: Option<Serving>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

pub struct Answer {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// OpenAI's envelope: `(status, message, param, code)`.
    pub fn error(&self) -> (u16, String, Value, Value) {
        let body = self.json();
        let error = &body["error"];
        assert_eq!(body.as_object().map(|o| o.len()), Some(1), "{}", self.text);
        let keys: Vec<&String> = error.as_object().expect("an error object").keys().collect();
        assert_eq!(keys, ["message", "type", "param", "code"], "{}", self.text);
        let message = error["message"].as_str().expect("a message").to_owned();
        (self.status, message, error["param"].clone(), error["code"].clone())
    }

    /// The JSON chunks of an event stream, which must end in `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let mut data: Vec<&str> = self.text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.text);
        data.iter().map(|data| serde_json::from_str(data).expect("a JSON chunk")).collect()
    }
}

impl Server {
    pub fn start() -> Self {
        Self::with(Options::default())
    }

    pub fn with(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_tokenizer(dir.path());
        for (name, value) in [("a", 0.1), ("b", 0.2), ("spare", 0.3)] {
            write_adapter(&dir.path().join(name), value);
        }
        let files = ModelFiles { name: BASE.into(), format: ModelFormat::HuggingFace(dir.path().to_owned()) };
        let registry = Registry::new(
            Arc::new(tiny_model()),
            RegistryConfig {
                slot_budget: 1 << 20,
                host_budget: 1 << 20,
                state_dir: options.state.clone(),
                reserved_names: vec![BASE.into()],
                base: ServedBase { names: vec![BASE.into()], fingerprint: "of the base".into(), chat_template: None },
                directory: options.adapters_dir.then(|| dir.path().to_owned()),
                ..RegistryConfig::default()
            },
        )
        .unwrap();
        let gate = Arc::new(Gate::default());
        let engine = Engine::start(
            Alphabet { gate: gate.clone(), slots: HashMap::new() },
            EngineConfig {
                block_size: 16,
                num_blocks: 256,
                max_batch_tokens: 64,
                max_running: options.max_running,
                max_waiting: options.max_waiting,
                max_model_len: options.max_model_len,
                eos_token_ids: vec![EOS],
                prefix_cache: true,
            },
            None,
        )
        .unwrap();
        let app = App::new(&HttpConfig {
            api_keys: options.api_keys,
            admin_key: options.admin_key,
            cors_origins: options.cors_origins,
            max_body: options.max_body,
            max_file: 1 << 20,
        })
        .unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(async {
            for name in ["a", "b"] {
                registry.load(name, dir.path().join(name).to_str().unwrap(), LoadOptions::default()).await.unwrap();
            }
            tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap()
        });
        let address = listener.local_addr().unwrap();
        runtime.block_on(registry.restore());
        let codec = Arc::new(TextCodec::load(&files).unwrap());
        let state = options.state.unwrap_or(dir.path().join("state"));
        let base = BaseInfo {
            names: vec![BASE.into()],
            files,
            shape: Arc::new(tiny_model()),
            fingerprint: "of the base".into(),
            device: Device::Cpu,
            sampling: SamplingParams::default(),
            weight_bytes: 0,
            step_bytes: 0,
        };
        let trainer = trainer::start();
        let grammars = Arc::new(GrammarCompiler::new(codec.clone()));
        let model = Arc::new(Runtime { base, codec, grammars, registry, engine: engine.clone(), trainer });
        let context = JobContext {
            runtime: model.clone(),
            max_running: 2,
            store: Arc::new(Store::open(&state).unwrap()),
            persistent: true,
        };
        let serving = Serving { runtime: model, jobs: Jobs::start(context, runtime.handle().clone()).unwrap() };
        let (stop, stopped) = oneshot::channel();
        let stopping = async {
            let _ = stopped.await;
        };
        let serve = quiver::server::serve(listener, app.clone(), stopping, options.drain_timeout);
        let thread = std::thread::spawn(move || {
            let result = runtime.block_on(serve);
            runtime.shutdown_background();
            result
        });
        let mut server =
            Self { address, gate, app, engine, dir, serving: Some(serving), stop: Some(stop), thread: Some(thread) };
        if options.loaded {
            server.finish_loading();
        }
        server
    }

    pub fn finish_loading(&mut self) {
        self.app.set_serving(self.serving.take().expect("it is not loaded yet"));
    }

    /// Requests that the engine has.
    pub fn open(&self) -> u64 {
        self.engine.stats().open.load(Relaxed)
    }

    /// Path of an adapter directory.
    pub fn adapter(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn stop(&mut self) {
        self.stop.take().expect("it runs").send(()).expect("it listens");
    }

    /// Waits for the end of `serve`.
    pub fn join(&mut self) -> Result<()> {
        self.thread.take().expect("it runs").join().expect("no panic")
    }

    /// One exchange on a connection of its own.
    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        read_answer(self.begin(method, path, headers, body))
    }

    /// Sends a request and leaves the answer unread.
    pub fn begin(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n");
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("content-length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        // A server that refuses a body may close before it has read it all.
        let _ = stream.write_all(body);
        stream
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: Value) -> Answer {
        self.send("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    /// Text of a completion's first choice.
    pub fn complete(&self, body: Value) -> String {
        let answer = self.post("/v1/completions", body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()["choices"][0]["text"].as_str().expect("a text").to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.gate.set(false);
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The object with the fields of `more`, which replace those of the same names.
pub fn merged(mut body: Value, more: &Value) -> Value {
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

/// Polls until something holds. Panics after 20 seconds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn read_answer(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("an answer");
    let text = String::from_utf8(bytes).expect("UTF-8");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no header end in {text:?}"));
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|l| l.split(' ').nth(1)).and_then(|s| s.parse().ok()).expect("a status");
    let headers: HashMap<String, String> =
        lines.filter_map(|l| l.split_once(": ")).map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned())).collect();
    let chunked = headers.get("transfer-encoding").is_some_and(|e| e == "chunked");
    Answer { status, text: if chunked { unchunk(body) } else { body.to_owned() }, headers }
}

fn unchunk(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("a chunk size");
        text.push_str(&rest[..size]);
        body = rest[size..].strip_prefix("\r\n").expect("a chunk end");
    }
    text
}

fn tiny_model() -> ModelConfig {
    ModelConfig {
        hidden_size: HIDDEN,
        intermediate_size: 16,
        num_layers: 1,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 4,
        vocab_size: VOCAB,
        rms_norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::None,
        qkv_bias: false,
        qk_norm: false,
        max_position_embeddings: 256,
    }
}

/// A rank-2 adapter on q_proj of the tiny model.
pub fn write_adapter(dir: &Path, value: f32) {
    std::fs::create_dir_all(dir).unwrap();
    let config = json!({
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none",
        "task_type": "CAUSAL_LM",
    });
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let data: Vec<u8> = std::iter::repeat_n(value.to_le_bytes(), 16).flatten().collect();
    let name = |half: &str| format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight");
    let tensors = [
        (name("A"), TensorView::new(Dtype::F32, vec![2, 8], &data).unwrap()),
        (name("B"), TensorView::new(Dtype::F32, vec![8, 2], &data).unwrap()),
    ];
    safetensors::serialize_to_file(tensors, None, &dir.join("adapter_model.safetensors")).unwrap();
}

/// A tokenizer with one token for each byte, whose id is the byte, and a chat template.
fn write_tokenizer(dir: &Path) {
    // GPT-2's names of bytes: printable ones stand for themselves, the rest for characters from U+0100 on.
    let mut spare = 0x100..;
    let vocab: serde_json::Map<String, Value> = (0..=255u8)
        .map(|byte| {
            let plain = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let code = if plain { u32::from(byte) } else { spare.next().expect("an endless range") };
            (char::from_u32(code).expect("a character").to_string(), byte.into())
        })
        .collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false})
    };
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(256, "<|im_start|>"), special(EOS, "<|im_end|>")],
        "pre_tokenizer": level, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"chat_template": template, "eos_token": "<|im_end|>"});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("config.json"), json!({"eos_token_id": EOS, "vocab_size": VOCAB}).to_string()).unwrap();
}

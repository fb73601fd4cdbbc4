//! Routes of the tokenizer: `/tokenize` and `/detokenize`, in vLLM's and llama.cpp's forms, and `/tokenizer_info`.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::Serving;
use super::SharedApp;
use super::error_response::ErrorResponse;
use super::extract::JsonBody;
use super::params::token_ids;
use super::select_adapter::LeasedAdapters;
use crate::error::blocking;
use crate::fields::{self, Fields};
use crate::text::codec::TextCodec;
use crate::text::messages::{CHAT_PROMPT_FIELDS, ChatPrompt};
use crate::text::tools::Tools;
use crate::{Error, Result};

/// Fields of `/tokenize` besides those of a chat prompt.
const TOKENIZE_FIELDS: &[&str] = &[
    "model",
    "adapter",
    "prompt",
    "add_special_tokens",
    "return_token_strs",
    "content",
    "add_special",
    "parse_special",
    "with_pieces",
];

/// `POST /tokenize`: token ids of `prompt` or `messages` in vLLM's form, or of `content` in llama.cpp's.
pub(super) async fn tokenize(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    let body = Fields::of_body(&body)?;
    fields::check_only(&body, &[TOKENIZE_FIELDS, CHAT_PROMPT_FIELDS, TOOL_FIELDS].concat())?;
    check_model(&body, serving).await?;
    let request = TokenizeRequest::parse(&body)?;
    let (codec, limit) = (serving.codec.clone(), serving.limits().max_model_len);
    Ok(Json(blocking(move || request.answer(&codec, limit)).await?))
}

/// Refuses a model or an adapter that is not loaded. All have the same tokenizer.
async fn check_model(body: &Fields<'_>, serving: &Serving) -> Result<()> {
    LeasedAdapters::select(body, &serving.base.names, &serving.registry).await.map(drop)
}

/// The fields of the tools of a chat.
const TOOL_FIELDS: &[&str] = &["tools", "tool_choice", "functions", "function_call"];

/// A checked request for tokens.
struct TokenizeRequest {
    input: TokenizeInput,
    /// Whether to add the model's special tokens.
    special: bool,
    form: TokenForm,
}

/// What is tokenized.
enum TokenizeInput {
    Text(String),
    Chat(Box<ChatPrompt>),
}

/// The form of the answer.
enum TokenForm {
    /// `count`, `max_model_len`, `tokens`, and `token_strs` or null.
    Vllm {
        /// Whether to spell out the tokens.
        strings: bool,
    },
    /// `tokens`.
    LlamaCpp {
        /// Whether a token is an object with its `id` and `piece`.
        pieces: bool,
    },
}

impl TokenizeRequest {
    fn parse(body: &Fields) -> Result<Self> {
        let given: Vec<&str> =
            ["prompt", "messages", "content"].into_iter().filter(|name| body.get(name).is_some()).collect();
        if let [first, second, ..] = given[..] {
            return Err(Error::invalid(format!("give either `{first}` or `{second}`, not both")).param(second));
        }
        match given.first() {
            Some(&"content") => Self::llama_cpp(body),
            Some(input) => Self::vllm(body, input),
            None => Err(Error::invalid(
                "`prompt` (a string), `messages` (an array), or llama.cpp's `content` (a string) is required",
            )
            .param("prompt")
            .code("missing_required_parameter")),
        }
    }

    fn vllm(body: &Fields, input: &str) -> Result<Self> {
        only_for(body, "content", &["add_special", "parse_special", "with_pieces"])?;
        let special = body.boolean("add_special_tokens")?;
        let form = TokenForm::Vllm { strings: body.boolean("return_token_strs")?.unwrap_or(false) };
        if input == "messages" {
            let tools = Tools::parse(body)?.map(|tools| tools.raw());
            let chat = ChatPrompt { tools, ..ChatPrompt::parse(body)? };
            // A chat template contains its own special tokens.
            return Ok(Self { input: TokenizeInput::Chat(Box::new(chat)), special: special.unwrap_or(false), form });
        }
        only_for_chats(body)?;
        let text = body.string("prompt")?.unwrap_or_default().to_owned();
        Ok(Self { input: TokenizeInput::Text(text), special: special.unwrap_or(true), form })
    }

    fn llama_cpp(body: &Fields) -> Result<Self> {
        only_for(body, "prompt", &["add_special_tokens", "return_token_strs"])?;
        only_for_chats(body)?;
        if body.boolean("parse_special")? == Some(false) {
            let message = "`parse_special` must be true: special tokens in a text are always recognised here";
            return Err(Error::invalid(message).param("parse_special").code("unsupported_parameter"));
        }
        Ok(Self {
            input: TokenizeInput::Text(body.string("content")?.unwrap_or_default().to_owned()),
            special: body.boolean("add_special")?.unwrap_or(false),
            form: TokenForm::LlamaCpp { pieces: body.boolean("with_pieces")?.unwrap_or(false) },
        })
    }

    /// The answer's body. `limit` is the longest sequence, in tokens.
    fn answer(self, codec: &TextCodec, limit: usize) -> Result<Value> {
        let text = match self.input {
            TokenizeInput::Text(text) => text,
            TokenizeInput::Chat(chat) => codec.render_chat(&codec.fit_tools(*chat))?,
        };
        let ids = codec.encode(&text, self.special)?;
        Ok(match self.form {
            TokenForm::Vllm { strings } => {
                let strings = strings.then(|| ids.iter().map(|&id| codec.spelling(id)).collect::<Vec<_>>());
                json!({"count": ids.len(), "max_model_len": limit, "tokens": ids, "token_strs": strings})
            }
            TokenForm::LlamaCpp { pieces: false } => json!({"tokens": ids}),
            TokenForm::LlamaCpp { pieces: true } => {
                let tokens: Vec<Value> = ids.iter().map(|&id| json!({"id": id, "piece": piece(codec, id)})).collect();
                json!({"tokens": tokens})
            }
        })
    }
}

/// Refuses fields that belong to another input.
fn only_for(body: &Fields, input: &str, names: &[&str]) -> Result<()> {
    let Some(name) = names.iter().find(|name| body.get(name).is_some()) else { return Ok(()) };
    Err(Error::invalid(format!("`{name}` is only allowed with `{input}`")).param(*name).code("invalid_value"))
}

fn only_for_chats(body: &Fields) -> Result<()> {
    only_for(body, "messages", CHAT_PROMPT_FIELDS)?;
    only_for(body, "messages", TOOL_FIELDS)
}

/// A token as text, or as bytes where it is part of a character.
fn piece(codec: &TextCodec, id: u32) -> Value {
    let bytes = codec.token_bytes(id);
    std::str::from_utf8(bytes).map_or_else(|_| json!(bytes), |text| json!(text))
}

/// `POST /detokenize`: the text of `tokens`.
pub(super) async fn detokenize(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    let body = Fields::of_body(&body)?;
    fields::check_only(&body, &["model", "adapter", "tokens"])?;
    check_model(&body, serving).await?;
    let tokens = body.required("tokens", body.array("tokens")?, "an array of token ids")?;
    let ids = token_ids(tokens, "tokens", serving.codec.vocab_size())?;
    Ok(Json(json!({"prompt": serving.codec.decode(&ids, false)?})))
}

/// `GET /tokenizer_info`, in vLLM's form: what a client needs to tokenize as the server does.
pub(super) async fn tokenizer_info(State(app): State<SharedApp>) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    let mut info = serving.codec.info()?;
    info["model_max_length"] = serving.limits().max_model_len.into();
    Ok(Json(info))
}

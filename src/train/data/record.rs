//! The records of training files, in the published formats.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::fields::{self, Fields};
use crate::text::messages::{ChatPrompt, read_messages};
use crate::text::tools::Tools;
use crate::{Error, Result};

/// Format of the records of a file. A file has only one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataFormat {
    /// OpenAI chat: `{"messages": [{"role", "content"}], "tools"}`, assistant messages with a `weight` of 0 or 1.
    Chat,
    /// `{"prompt", "completion"}`.
    PromptCompletion,
    /// Stanford Alpaca: `{"instruction", "input", "output"}`.
    Alpaca,
    /// `{"conversations": [{"from": "human" | "gpt" | "system", "value"}]}`.
    #[serde(rename = "sharegpt")]
    ShareGpt,
    /// `{"text"}`.
    Text,
}

/// End of an Alpaca prompt. Both variants are in use, and an adapter trained with one answers worse to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum AlpacaEnding {
    /// `### Response:` (Stanford Alpaca).
    #[default]
    Colon,
    /// `### Response:` and a newline (alpaca-lora, Axolotl).
    Newline,
}

/// A record, independent of its format.
#[derive(Debug, PartialEq)]
pub(super) enum TrainingRecord {
    /// A conversation.
    Chat {
        /// The whole conversation, with the tools and variables for the chat template.
        chat: ChatPrompt,
        /// Whether each message is an answer to train on. The first never is, as no prompt precedes it.
        trained: Vec<bool>,
    },
    /// A prompt and its completion.
    Pair { prompt: String, completion: String },
    /// Text without a prompt.
    Text(String),
}

/// Keys that change the prompt and are not supported. Ignoring them would train on another prompt.
const REFUSED: [&str; 5] = ["system", "history", "chat_template", "continue_final_message", "add_generation_prompt"];

/// Keys that change the prompt, and that only records with `messages` have.
const REFUSED_OUTSIDE_CHATS: [&str; 4] = ["tools", "functions", "documents", "chat_template_kwargs"];

impl DataFormat {
    /// The format of a record.
    ///
    /// # Errors
    /// `Invalid`: the record has no supported format. The message lists the formats.
    pub(super) fn of(record: &Value) -> Result<Self> {
        // `text` comes last, because Alpaca files have a column of that name too.
        let by_key = [
            ("messages", Self::Chat),
            ("conversations", Self::ShareGpt),
            ("prompt", Self::PromptCompletion),
            ("instruction", Self::Alpaca),
            ("text", Self::Text),
        ];
        let found = by_key.into_iter().find(|(key, _)| record.get(key).is_some_and(|value| !value.is_null()));
        found.map(|(_, format)| format).ok_or_else(|| {
            Error::invalid(
                "not a training record: a record is an object with `messages` (OpenAI chat), `prompt` and `completion`, \
                 `instruction`, `input` and `output` (Alpaca), `conversations` (ShareGPT), or `text`",
            )
        })
    }

    /// The name in messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Chat => "OpenAI chat",
            Self::PromptCompletion => "prompt/completion",
            Self::Alpaca => "Alpaca",
            Self::ShareGpt => "ShareGPT",
            Self::Text => "text",
        }
    }

    /// Reads a record of this format.
    ///
    /// # Errors
    /// `Invalid`: a key is missing, unknown or has a wrong value. The message says what is allowed.
    pub(super) fn read(self, record: &Value, ending: AlpacaEnding) -> Result<TrainingRecord> {
        if !record.is_object() {
            return Err(Error::invalid(format!("a record must be an object, not {}", fields::describe(record))));
        }
        let record = Fields::of_value(record, "")?;
        let empty = |value: &Value| match value {
            Value::Array(list) => list.is_empty(),
            Value::String(text) => text.is_empty(),
            _ => false,
        };
        let outside: &[&str] = if self == Self::Chat { &[] } else { &REFUSED_OUTSIDE_CHATS };
        let mut refused = REFUSED.iter().chain(outside);
        if let Some(&key) = refused.find(|key| record.get(key).is_some_and(|value| !empty(value))) {
            let message = format!("`{key}` is not supported: prompts are made from {} alone", self.keys());
            return Err(Error::invalid(message).param(key).code("unsupported_parameter"));
        }
        let text =
            |key: &str| -> Result<String> { Ok(record.required(key, record.string(key)?, "a string")?.to_owned()) };
        match self {
            Self::Chat => chat(&record),
            Self::ShareGpt => sharegpt(&record),
            Self::PromptCompletion => {
                Ok(TrainingRecord::Pair { prompt: text("prompt")?, completion: text("completion")? })
            }
            Self::Alpaca => {
                // `input` is optional, so a misspelt one must be an error.
                fields::check_unknown(&record, &["instruction", "input", "output"])?;
                let prompt = alpaca(&text("instruction")?, record.string("input")?.unwrap_or_default(), ending);
                Ok(TrainingRecord::Pair { prompt, completion: text("output")? })
            }
            Self::Text => Ok(TrainingRecord::Text(text("text")?)),
        }
    }

    fn keys(self) -> &'static str {
        match self {
            Self::Chat => "`messages`",
            Self::PromptCompletion => "`prompt`",
            Self::Alpaca => "`instruction` and `input`",
            Self::ShareGpt => "`conversations`",
            Self::Text => "`text`",
        }
    }
}

fn chat(record: &Fields) -> Result<TrainingRecord> {
    let list = turns(record, "messages", "an array of {\"role\", \"content\"}")?;
    let messages = read_messages(list, &["weight"])?;
    let mut trained = Vec::with_capacity(list.len());
    for (i, value) in list.iter().enumerate() {
        let turn = Fields::of_value(value, format!("messages[{i}]"))?;
        trained.push(is_trained(&turn, messages[i]["role"] == "assistant")? && i > 0);
    }
    let tools = Tools::parse(record)?.map(|tools| tools.raw());
    let chat = ChatPrompt { tools, ..ChatPrompt::of_record(record, messages)? };
    check_answers(&chat.messages, "messages", "assistant")?;
    Ok(TrainingRecord::Chat { chat, trained })
}

/// Refuses a conversation without an answer after its first turn.
fn check_answers(messages: &[Value], key: &str, role: &str) -> Result<()> {
    if messages.iter().skip(1).any(|message| message["role"] == "assistant") {
        return Ok(());
    }
    let why = match messages.iter().any(|message| message["role"] == "assistant") {
        true => format!("its only message of the role {role} is the first one, which answers nothing"),
        false => format!("it has no message of the role {role}"),
    };
    Err(Error::invalid(format!("`{key}`: there is no answer to train on: {why}")).param(key).code("invalid_value"))
}

fn sharegpt(record: &Fields) -> Result<TrainingRecord> {
    let list = turns(record, "conversations", "an array of {\"from\", \"value\"}")?;
    let (mut messages, mut trained) = (Vec::new(), Vec::new());
    for (i, value) in list.iter().enumerate() {
        let turn = Fields::of_value(value, format!("conversations[{i}]"))?;
        fields::check_unknown(&turn, &["from", "value", "weight"])?;
        let role = match turn.required("from", turn.string("from")?, "human, gpt or system")? {
            "human" | "user" => "user",
            "gpt" | "assistant" => "assistant",
            "system" => "system",
            other => return Err(fields::wrong(&turn.path_of("from"), "human, gpt or system", &other.into())),
        };
        trained.push(is_trained(&turn, role == "assistant")? && i > 0);
        messages.push(json!({"role": role, "content": turn.required("value", turn.string("value")?, "a string")?}));
    }
    check_answers(&messages, "conversations", "gpt")?;
    Ok(TrainingRecord::Chat { chat: ChatPrompt::of(messages, false), trained })
}

fn turns<'a>(record: &Fields<'a>, key: &str, what: &str) -> Result<&'a [Value]> {
    let list = record.required(key, record.array(key)?, what)?;
    if list.is_empty() {
        return Err(fields::wrong(key, "an array of at least one message", &json!([])));
    }
    Ok(list)
}

/// Whether a turn is trained on: answers are, unless their `weight` is 0.
fn is_trained(turn: &Fields, answer: bool) -> Result<bool> {
    let weight = turn.integer("weight", 0..=1)?;
    if !answer && weight == Some(1) {
        return Err(fields::wrong(
            &turn.path_of("weight"),
            "0 or absent: only the assistant's turns are trained",
            &1.into(),
        ));
    }
    Ok(answer && weight != Some(0))
}

/// The prompt of Stanford Alpaca's `train.py`.
fn alpaca(instruction: &str, input: &str, ending: AlpacaEnding) -> String {
    let (context, input) = match input {
        "" => ("", String::new()),
        input => (", paired with an input that provides further context", format!("### Input:\n{input}\n\n")),
    };
    let end = match ending {
        AlpacaEnding::Colon => "",
        AlpacaEnding::Newline => "\n",
    };
    format!(
        "Below is an instruction that describes a task{context}. Write a response that appropriately completes the \
         request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:{end}"
    )
}

//! The table of `/v1/responses`.

use super::tables::{INERT, SAMPLING, SERVED_OTHERWISE};
use super::{FieldTable, RequestField, honoured, means, no_effect, refused, refused_unless};

/// `POST /v1/responses`.
pub(in crate::server) const RESPONSES: FieldTable = FieldTable {
    routes: "/v1/responses",
    parts: &[RESPONSE_FIELDS, CHAT_FIELDS, SAMPLING, NO_EFFECT, NOT_DONE, SERVED_OTHERWISE, INERT],
};

/// The fields of OpenAI's API.
const RESPONSE_FIELDS: &[RequestField] = &[
    means("model", "the base, an adapter, or `base:adapter`"),
    means("adapter", "an adapter, or a list of adapters with weights"),
    means("input", "text, or items: messages, calls and their outputs, reasoning, references to stored items"),
    means("instructions", "a system message before the input"),
    means("previous_response_id", "continues a stored response"),
    means("store", "keeps the response in memory, as long as there is room (default true)"),
    means("metadata", "stored with the response and returned"),
    means(
        "include",
        "`message.output_text.logprobs`; what belongs to built-in tools, images or encryption has no effect",
    ),
    honoured("top_logprobs"),
    honoured("max_output_tokens"),
    honoured("stream"),
    honoured("stream_options"),
    means("text", "`format`; `verbosity` only as \"medium\""),
    means("tools", "functions; built-in tools are refused"),
    honoured("tool_choice"),
    honoured("parallel_tool_calls"),
    means(
        "reasoning",
        "`effort`, which the chat template must read; `summary` has no effect, as the thinking itself is given",
    ),
];

/// vLLM's fields, as in chats.
const CHAT_FIELDS: &[RequestField] = &[
    means("include_reasoning", "`false` leaves the thinking out of the reply (vLLM; default true)"),
    means("structured_outputs", "`json`, `regex`, `choice`, `grammar` or `json_object` (vLLM)"),
    means("chat_template_kwargs", "further variables of the template (vLLM)"),
];

const NO_EFFECT: &[RequestField] = &[
    no_effect("max_tool_calls", "counts calls of built-in tools, of which there are none"),
    no_effect("image", "for images, which the model does not read"),
];

const NOT_DONE: &[RequestField] = &[
    refused("background", "responses are not generated in the background: use `stream`, or wait for the reply"),
    refused("background_options", "responses are not generated in the background"),
    refused("conversation", "conversations are not stored: use `previous_response_id`, or send all items as `input`"),
    refused("prompt", "prompt templates are not stored: use `instructions` and `input`"),
    refused_unless("truncation", "\"disabled\"", "the input is never cut: send fewer items"),
    refused("context_management", "the input is never compacted: send fewer items"),
    refused("moderation", "the server does not moderate"),
    refused("access_programs", "the server has no access programs"),
    refused("enable_response_messages", "POST /tokenize renders messages"),
    refused("previous_input_messages", "send the messages as `input`"),
    refused("messages", "use `input` here, or POST /v1/chat/completions"),
    refused("max_tokens", "use `max_output_tokens`"),
    refused("max_completion_tokens", "use `max_output_tokens`"),
    refused("response_format", "use `text.format`"),
    refused("reasoning_effort", "use `reasoning.effort`"),
    refused("logprobs", "use `include`: [\"message.output_text.logprobs\"] and `top_logprobs`"),
    refused_unless("n", "1", "a response has one output"),
];

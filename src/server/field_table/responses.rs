//! The table of `/v1/responses`.

use super::tables::SERVED_OTHERWISE;
use super::{FieldTable, RequestField, honoured, means, no_effect, refused, refused_unless};

/// `POST /v1/responses`.
pub(in crate::server) const RESPONSES: FieldTable =
    FieldTable { routes: "/v1/responses", parts: &[RESPONSE_FIELDS, SAMPLING, NO_EFFECT, NOT_DONE, SERVED_OTHERWISE] };

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
    honoured("temperature"),
    honoured("top_p"),
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
    means("service_tier", "every value is served alike; the reply says `default`"),
];

/// vLLM's fields, as in chats.
const SAMPLING: &[RequestField] = &[
    means("top_k", "0 or -1 keeps all tokens"),
    means("min_p", "drops tokens below this fraction of the likeliest token's probability"),
    means("seed", "any 64-bit integer"),
    means("stop", "up to 16 strings that end the output"),
    means("stop_token_ids", "ids that end the output (vLLM)"),
    means("min_tokens", "tokens before which the output cannot end (vLLM)"),
    means("ignore_eos", "continues after the model's end of sequence (vLLM)"),
    means("repetition_penalty", "over the whole prompt and output (vLLM)"),
    means("presence_penalty", "as in chats"),
    means("frequency_penalty", "as in chats"),
    means("logit_bias", "as in chats"),
    means("allowed_token_ids", "only these tokens may come (vLLM)"),
    means("bad_words", "texts that are not generated (vLLM)"),
    means("skip_special_tokens", "leaves special tokens out of the text (vLLM; default true)"),
    means("include_stop_str_in_output", "keeps the stop string (vLLM)"),
    means("include_reasoning", "`false` leaves the thinking out of the reply (vLLM; default true)"),
    means("structured_outputs", "`json`, `regex`, `choice`, `grammar` or `json_object` (vLLM)"),
    means("chat_template_kwargs", "further variables of the template (vLLM)"),
    means("priority", "orders waiting requests of the same adapter, the lowest first (vLLM)"),
    means("cache_salt", "only requests with the same salt share cached prefixes (vLLM)"),
    means("request_id", "becomes part of the reply's `id` (vLLM)"),
];

const NO_EFFECT: &[RequestField] = &[
    no_effect("max_tool_calls", "counts calls of built-in tools, of which there are none"),
    no_effect("user", "the server keeps no state per user"),
    no_effect("safety_identifier", "the server keeps no state per user"),
    no_effect("session_id", "the server keeps no state per session"),
    no_effect("prompt_cache_key", "the prefix cache finds every shared prefix"),
    no_effect("prompt_cache_options", "the prefix cache finds every shared prefix"),
    no_effect("prompt_cache_retention", "the prefix cache evicts what was used longest ago"),
    no_effect("spaces_between_special_tokens", "a token always stands for the same bytes"),
    no_effect("image", "for images, which the model does not read"),
    no_effect("media_io_kwargs", "for media, which the model does not read"),
    no_effect("mm_processor_kwargs", "for media, which the model does not read"),
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

//! The tables of Anthropic's `/v1/messages` and `/v1/messages/count_tokens`.

use super::{FieldTable, RequestField, honoured, means, no_effect, refused, refused_unless};

/// `POST /v1/messages`.
pub(in crate::server) const MESSAGES: FieldTable =
    FieldTable { routes: "/v1/messages", parts: &[GENERATION, PROMPT, NOT_SERVED] };

/// `POST /v1/messages/count_tokens`.
pub(in crate::server) const COUNT_TOKENS: FieldTable =
    FieldTable { routes: "/v1/messages/count_tokens", parts: &[PROMPT, NOT_SERVED] };

/// The fields that make the prompt.
const PROMPT: &[RequestField] = &[
    means("model", "the base, an adapter, or `base:adapter`"),
    means("adapter", "an adapter, or a list of adapters with weights"),
    means(
        "messages",
        "text, `tool_use`, `tool_result` and `thinking` blocks; a last message of the assistant is continued",
    ),
    means("system", "text, or blocks of text"),
    means("tools", "tools with an `input_schema`"),
    means("tool_choice", "`auto`, `any`, `tool` or `none`, with `disable_parallel_tool_use`"),
    means(
        "thinking",
        "off unless `enabled` or `adaptive`, where the chat template can turn it off; `budget_tokens` is no limit",
    ),
    means(
        "output_config",
        "`format` is a JSON schema that is enforced; `effort` is a variable of the chat template, which must read it",
    ),
    means("chat_template_kwargs", "further variables of the template (vLLM)"),
    no_effect("cache_control", "the prefix cache finds every shared prefix"),
    no_effect("user_profile_id", "the server keeps no state per user"),
    no_effect("workspace_id", "the server keeps no state per workspace"),
    refused_unless("speed", "\"standard\"", "every request is served alike"),
];

/// The fields that say how to answer.
const GENERATION: &[RequestField] = &[
    honoured("max_tokens"),
    honoured("stop_sequences"),
    honoured("stream"),
    means("temperature", "0 to 1"),
    honoured("top_p"),
    means("top_k", "0 or -1 keeps all tokens"),
    means("cache_salt", "only requests with the same salt share cached prefixes (vLLM)"),
    no_effect("metadata", "nothing is stored"),
    no_effect("service_tier", "every value is served alike"),
];

/// What this server does not have.
const NOT_SERVED: &[RequestField] = &[
    refused("container", "the server runs no code"),
    refused("mcp_servers", "the server calls no other servers: give `tools`"),
    refused("context_management", "the context is never edited: leave out old messages"),
    refused("diagnostics", "cache misses are not reported; `usage` has the cached tokens"),
    refused("inference_geo", "the server has one place"),
    refused("fallbacks", "a request is answered by the model that it names"),
    refused("watermarking", "watermarks are not supported"),
    refused("mm_payload", "the model reads text only"),
    refused("return_mm_kwargs", "the model reads text only"),
    refused("kv_transfer_params", "the KV cache is not transferred between servers"),
    refused("ec_transfer_params", "the model reads text only"),
    refused("vllm_xargs", "no further arguments are known"),
];

//! The tables of `/v1/completions` and `/v1/chat/completions`.

use super::{FieldTable, RequestField, honoured, means, no_effect, refused, refused_unless};

/// `POST /v1/completions`.
pub(in crate::server) const COMPLETIONS: FieldTable = FieldTable {
    routes: "/v1/completions",
    parts: &[COMPLETION_FIELDS, GENERATION, SAMPLING, STRUCTURED, INERT, SERVED_OTHERWISE, LLAMA_CPP, CHAT_ONLY],
};

/// `POST /v1/chat/completions`.
pub(in crate::server) const CHAT_COMPLETIONS: FieldTable = FieldTable {
    routes: "/v1/chat/completions",
    parts: &[CHAT_FIELDS, GENERATION, SAMPLING, STRUCTURED, INERT, SERVED_OTHERWISE, LLAMA_CPP, COMPLETION_ONLY],
};

/// `POST /v1/embeddings`.
pub(in crate::server) const EMBEDDINGS: FieldTable =
    FieldTable { routes: "/v1/embeddings", parts: &[EMBEDDING_FIELDS] };

const EMBEDDING_FIELDS: &[RequestField] = &[
    means("model", "the base, an adapter, or `base:adapter`"),
    means("adapter", "an adapter, or a list of adapters with weights"),
    honoured("input"),
    honoured("encoding_format"),
    means("dimensions", "only the width of the model's hidden states"),
    means("pooling", "`last` (default) or `mean`"),
    means("normalize", "scales the vectors to length 1 (default true)"),
    means("use_activation", "vLLM's `normalize`"),
    means("add_special_tokens", "whether the model's special tokens go around a text (vLLM; default true)"),
    means(
        "truncate_prompt_tokens",
        "keeps this many tokens of an input, the last ones (vLLM); -1 is the context length",
    ),
    means("truncation_side", "`left` (default) or `right`: where an input is cut (vLLM)"),
    means("embed_dtype", "only `float32` (vLLM)"),
    means("endianness", "only `little` (vLLM)"),
    means("priority", "orders waiting requests of the same adapter, the lowest first (vLLM)"),
    means("cache_salt", "only requests with the same salt share cached prefixes (vLLM)"),
    no_effect("user", "the server keeps no state per user"),
    no_effect("mm_processor_kwargs", "for media, which the model does not read"),
    no_effect("media_io_kwargs", "for media, which the model does not read"),
    no_effect("request_id", "the reply's id is the server's own"),
    refused_unless("padding", "\"do_not_pad\"", "inputs are not padded"),
    refused("messages", "POST /tokenize takes `messages` and answers with token ids, which `input` takes"),
];

/// The fields of `/v1/completions` alone.
const COMPLETION_FIELDS: &[RequestField] = &[
    honoured("prompt"),
    honoured("suffix"),
    honoured("echo"),
    honoured("best_of"),
    means("logprobs", "number of alternatives per token, 0 to 20"),
    means("add_special_tokens", "whether the model's special tokens go around a prompt of text (vLLM; default true)"),
];

/// Fields of chats in a body for `/v1/completions`.
const CHAT_ONLY: &[RequestField] = &[
    refused("messages", "use `prompt` here, or POST /v1/chat/completions"),
    refused("tools", "tools belong to chats: POST /v1/chat/completions"),
    refused_unless("tool_choice", "\"none\"", "tools belong to chats: POST /v1/chat/completions"),
    refused("functions", "functions belong to chats: POST /v1/chat/completions"),
    refused("function_call", "functions belong to chats: POST /v1/chat/completions"),
    refused("chat_template", "templates belong to chats: POST /v1/chat/completions"),
    refused("chat_template_kwargs", "templates belong to chats: POST /v1/chat/completions"),
    refused("top_logprobs", "`logprobs` is the number of alternatives here"),
    no_effect("parallel_tool_calls", "only with tools, which belong to chats"),
];

/// The fields of `/v1/chat/completions` alone.
const CHAT_FIELDS: &[RequestField] = &[
    honoured("messages"),
    honoured("logprobs"),
    honoured("top_logprobs"),
    honoured("tools"),
    honoured("tool_choice"),
    honoured("parallel_tool_calls"),
    means("functions", "the older form of `tools`"),
    means("function_call", "the older form of `tool_choice`"),
    means("reasoning_effort", "a variable of the chat template, which must read it"),
    means("include_reasoning", "`false` leaves the thinking out of the reply (vLLM; default true)"),
    means("reasoning_format", "`none` leaves the thinking in `content`; `auto` and `deepseek` separate it (llama.cpp)"),
    means("add_generation_prompt", "whether the prompt opens the assistant's turn (vLLM; default true)"),
    means("continue_final_message", "whether the answer continues the last message (vLLM)"),
    refused(
        "chat_template",
        "a request's template can take any time and memory: change the model's own, or render the prompt and use /v1/completions",
    ),
    means("chat_template_kwargs", "further variables of the template (vLLM)"),
    means("documents", "a variable of the template (vLLM)"),
    refused_unless("modalities", "[\"text\"]", "the model reads and writes text only"),
    refused_unless("audio", "null", "the model reads and writes text only"),
    refused_unless("web_search_options", "null", "the server does not search the web: give a tool"),
    refused_unless("moderation", "null", "the server does not moderate"),
    refused_unless("verbosity", "\"medium\"", "say in the messages how long the answer should be, or set `max_tokens`"),
    no_effect("prediction", "predicted outputs change only the speed"),
    refused("echo", "only on /v1/completions; the answer can continue the last message (`continue_final_message`)"),
    refused("add_special_tokens", "the template contains the special tokens"),
    refused_unless("parse_tool_calls", "true", "tool calls are always parsed where the request has tools"),
    refused("reasoning_in_content", "use `reasoning_format`: \"none\""),
    refused("thinking_forced_open", "the template decides: use `chat_template_kwargs`"),
    refused("chat_format", "the template decides"),
    refused("generation_prompt", "use `continue_final_message`"),
    refused("return_prompt_text", "POST /tokenize renders messages"),
];

/// Fields of completions in a body for `/v1/chat/completions`.
const COMPLETION_ONLY: &[RequestField] = &[
    refused("prompt", "use `messages` here, or POST /v1/completions"),
    refused("suffix", "only on /v1/completions"),
    refused_unless("best_of", "1", "only on /v1/completions; `n` gives several choices"),
];

/// The fields that completions and chats have in common.
const GENERATION: &[RequestField] = &[
    means("model", "the base, an adapter, or `base:adapter`"),
    means("adapter", "an adapter, or a list of adapters with weights"),
    honoured("stream"),
    means("stream_options", "`include_usage`, and vLLM's `continuous_usage_stats`"),
    honoured("n"),
    honoured("max_tokens"),
    honoured("max_completion_tokens"),
    means("n_predict", "llama.cpp's `max_tokens`; -1 is no limit"),
    means("repeat_penalty", "llama.cpp's `repetition_penalty`, over the whole prompt and output"),
    means("logprob_token_ids", "with `logprobs`: the alternatives are these ids (vLLM)"),
    means("prompt_logprobs", "log-probabilities of the prompt with this many alternatives, 0 to 20 (vLLM)"),
    means("return_token_ids", "adds `token_ids` and `prompt_token_ids` (vLLM)"),
    means("return_tokens_as_token_ids", "names tokens of log-probabilities `token_id:ID` (vLLM)"),
    means(
        "truncate_prompt_tokens",
        "keeps this many tokens of the prompt, the last ones (vLLM); -1 is the context length",
    ),
    means("truncation_side", "`left` (default) or `right`: where the prompt is cut (vLLM)"),
    no_effect("metadata", "nothing is stored"),
    no_effect("store", "nothing is stored"),
];

/// How tokens are sampled and become text, and how a request is queued: of every API with OpenAI's names.
pub(super) const SAMPLING: &[RequestField] = &[
    means("min_tokens", "tokens before which the output cannot end (vLLM)"),
    honoured("temperature"),
    honoured("top_p"),
    means("top_k", "0 or -1 keeps all tokens"),
    means("min_p", "drops tokens below this fraction of the likeliest token's probability"),
    means("repetition_penalty", "over the whole prompt and output (vLLM)"),
    honoured("presence_penalty"),
    honoured("frequency_penalty"),
    honoured("logit_bias"),
    means("allowed_token_ids", "only these tokens may come (vLLM)"),
    means("bad_words", "texts that are not generated (vLLM)"),
    means("seed", "any 64-bit integer"),
    honoured("stop"),
    means("stop_token_ids", "ids that end the output (vLLM)"),
    means("include_stop_str_in_output", "keeps the stop string (vLLM)"),
    means("skip_special_tokens", "leaves special tokens out of the text (vLLM; default true)"),
    means("ignore_eos", "continues after the model's end of sequence (vLLM)"),
    means("priority", "orders waiting requests of the same adapter, the lowest first (vLLM)"),
    means("cache_salt", "only requests with the same salt share cached prefixes (vLLM)"),
    means("request_id", "becomes part of the reply's `id` (vLLM)"),
    means("service_tier", "every value is served alike; the reply says `default`"),
];

/// What has no effect in any of these APIs.
pub(super) const INERT: &[RequestField] = &[
    no_effect("user", "the server keeps no state per user"),
    no_effect("safety_identifier", "the server keeps no state per user"),
    no_effect("session_id", "the server keeps no state per session"),
    no_effect("prompt_cache_key", "the prefix cache finds every shared prefix"),
    no_effect("prompt_cache_options", "the prefix cache finds every shared prefix"),
    no_effect("prompt_cache_retention", "the prefix cache evicts what was used longest ago"),
    no_effect("spaces_between_special_tokens", "a token always stands for the same bytes"),
    no_effect("media_io_kwargs", "for media, which the model does not read"),
    no_effect("mm_processor_kwargs", "for media, which the model does not read"),
];

/// The fields that constrain an output.
const STRUCTURED: &[RequestField] = &[
    honoured("response_format"),
    means("structured_outputs", "`json`, `regex`, `choice`, `grammar` or `json_object` (vLLM)"),
    means("guided_json", "older form of `structured_outputs.json` (vLLM)"),
    means("guided_regex", "older form of `structured_outputs.regex` (vLLM)"),
    means("guided_choice", "older form of `structured_outputs.choice` (vLLM)"),
    means("guided_grammar", "older form of `structured_outputs.grammar` (vLLM)"),
    means("guided_whitespace_pattern", "older form of `structured_outputs.whitespace_pattern` (vLLM)"),
    means("grammar", "a grammar in GBNF or Lark (llama.cpp)"),
    means("json_schema", "a JSON schema (llama.cpp)"),
    no_effect("guided_decoding_backend", "there is one backend, llguidance"),
    refused("grammar_lazy", "a grammar holds from the first token on"),
    refused("grammar_triggers", "a grammar holds from the first token on"),
    no_effect("preserved_tokens", "grammars see every token"),
    refused("regex", "SGLang's name: use `structured_outputs.regex`"),
    refused("ebnf", "SGLang's name: use `structured_outputs.grammar`"),
    refused("structural_tag", "use `tools` with `strict`, or `structured_outputs.grammar`"),
];

/// Fields of other servers that ask for what this one does not do.
pub(super) const SERVED_OTHERWISE: &[RequestField] = &[
    refused("use_beam_search", "beam search is not supported: use `n`, or `best_of` on /v1/completions"),
    refused_unless("length_penalty", "1", "only for beam search, which is not supported"),
    refused("early_stopping", "only for beam search, which is not supported"),
    refused("prompt_embeds", "embeddings as prompts are not supported: give text or token ids"),
    refused("watermarking", "watermarks are not supported"),
    refused("repetition_detection", "use `repetition_penalty`, `frequency_penalty` or `stop`"),
    refused("thinking_token_budget", "the length of the thinking cannot be limited: set `max_tokens`"),
    refused_unless("stream_interval", "1", "every token is sent as it comes"),
    refused_unless("routed_experts_prompt_start", "0", "the model has no experts"),
    refused("return_weight_versions", "`adapter_generation` in the reply names the weights"),
    refused("return_token_offsets", "`logprobs` on /v1/completions gives `text_offset`"),
    refused("return_mm_kwargs", "the model reads text only"),
    refused("mm_payload", "the model reads text only"),
    refused("kv_transfer_params", "the KV cache is not transferred between servers"),
    refused("ec_transfer_params", "the model reads text only"),
    refused("vllm_xargs", "no further arguments are known"),
    refused("logits_processors", "use `logit_bias`, `allowed_token_ids` or a grammar"),
    refused("custom_logit_processor", "use `logit_bias`, `allowed_token_ids` or a grammar"),
    refused("return_hidden_states", "POST /v1/embeddings gives pooled hidden states"),
    refused("stop_regex", "use `stop` or a grammar"),
    refused("max_new_tokens", "use `max_tokens`"),
    refused("do_sample", "`temperature` 0 is greedy"),
    refused("truncate", "use `truncate_prompt_tokens`"),
    refused_unless("separate_reasoning", "true", "use `reasoning_format`: \"none\""),
];

/// llama.cpp's fields.
const LLAMA_CPP: &[RequestField] = &[
    no_effect("cache_prompt", "the prefix cache does not change answers"),
    no_effect("n_cache_reuse", "the prefix cache does not change answers"),
    no_effect("id_slot", "requests are not bound to slots"),
    no_effect("n_keep", "the context is never shifted"),
    no_effect("n_discard", "the context is never shifted"),
    no_effect("mirostat_tau", "only with `mirostat`"),
    no_effect("mirostat_eta", "only with `mirostat`"),
    no_effect("dynatemp_exponent", "only with `dynatemp_range`"),
    no_effect("xtc_threshold", "only with `xtc_probability`"),
    no_effect("dry_base", "only with `dry_multiplier`"),
    no_effect("dry_allowed_length", "only with `dry_multiplier`"),
    no_effect("dry_penalty_last_n", "only with `dry_multiplier`"),
    no_effect("dry_sequence_breakers", "only with `dry_multiplier`"),
    no_effect("adaptive_decay", "only with `adaptive_target`"),
    no_effect("backend_sampling", "the sampler runs where the logits are"),
    no_effect("speculative.n_max", "tokens are not drafted, which changes only the speed"),
    no_effect("speculative.n_min", "tokens are not drafted, which changes only the speed"),
    no_effect("speculative.p_min", "tokens are not drafted, which changes only the speed"),
    no_effect("speculative.type", "tokens are not drafted, which changes only the speed"),
    refused_unless("repeat_last_n", "-1", "penalties count the whole prompt and output"),
    refused_unless("typical_p", "1", "use `top_p`, `top_k` or `min_p`"),
    refused_unless("typ_p", "1", "use `top_p`, `top_k` or `min_p`"),
    refused_unless("top_n_sigma", "-1", "use `top_p`, `top_k` or `min_p`"),
    refused_unless("xtc_probability", "0", "use `top_p`, `top_k` or `min_p`"),
    refused_unless("tfs_z", "1", "use `top_p`, `top_k` or `min_p`"),
    refused_unless("top_a", "0", "use `min_p`"),
    refused_unless("dynatemp_range", "0", "the temperature is fixed: use `temperature`"),
    refused_unless("mirostat", "0", "use `top_p`, `top_k` or `min_p`"),
    refused_unless("dry_multiplier", "0", "use `repetition_penalty` or `frequency_penalty`"),
    refused_unless("adaptive_target", "-1", "use `temperature`"),
    refused_unless("min_keep", "0", "use `top_k`"),
    refused("samplers", "the order is fixed: `min_p`, `top_k`, `top_p`"),
    refused_unless("n_indent", "0", "use a grammar"),
    refused_unless("n_probs", "0", "use `logprobs`"),
    refused("post_sampling_probs", "`logprobs` gives the probabilities before truncation"),
    refused_unless("n_cmpl", "1", "use `n`"),
    refused_unless("t_max_predict_ms", "0", "use `max_tokens`"),
    refused("response_fields", "the reply always has all its fields"),
    refused("return_tokens", "use `return_token_ids`"),
    refused("return_progress", "the progress of the prompt is not reported"),
    refused("timings_per_token", "GET /metrics has the latencies"),
    refused("verbose", "GET /metrics and the log have details"),
    refused("input_prefix", "use `suffix` on /v1/completions for infilling"),
    refused("input_suffix", "use `suffix` on /v1/completions for infilling"),
    refused("input_extra", "put other files into `prompt`"),
];

//! The tables of TGI's and LoRAX's `/generate`, `/generate_stream` and `/`.

use super::{FieldTable, RequestField, honoured, means, refused, refused_unless};

/// A body for `POST /generate`, `/generate_stream` or `/`.
pub(in crate::server) const GENERATE: FieldTable =
    FieldTable { routes: "/generate, /generate_stream and /", parts: &[BODY] };

/// The object `parameters` of such a body.
pub(in crate::server) const GENERATE_PARAMETERS: FieldTable =
    FieldTable { routes: "`parameters` of /generate, /generate_stream and /", parts: &[PARAMETERS] };

const BODY: &[RequestField] = &[
    means("inputs", "the prompt: text"),
    honoured("parameters"),
    means("stream", "on `/`; /generate and /generate_stream have one form each"),
    refused("model", "use `parameters.adapter_id`"),
    refused("adapter", "use `parameters.adapter_id`"),
];

const PARAMETERS: &[RequestField] = &[
    means("adapter_id", "a loaded adapter; absent, empty and LoRAX's `__base__` are the base"),
    means(
        "merged_adapters",
        "`ids` and `weights`: the deltas are added with their weights; `merge_strategy` is `linear` (LoRAX)",
    ),
    refused_unless(
        "adapter_source",
        "\"local\"",
        "only loaded adapters are served: load one by PUT /admin/adapters/{name}",
    ),
    refused("api_token", "nothing is downloaded for a request: load the adapter by PUT /admin/adapters/{name}"),
    means(
        "do_sample",
        "samples at temperature 1; so does any of `temperature`, `top_k` and `top_p`; without them, the output is greedy",
    ),
    means("temperature", "0 is greedy"),
    honoured("top_k"),
    honoured("top_p"),
    refused_unless("typical_p", "1", "use `top_p` or `top_k`"),
    means("repetition_penalty", "over the whole prompt and output"),
    honoured("frequency_penalty"),
    honoured("seed"),
    means("max_new_tokens", "without it, the output ends with the context"),
    means("stop", "strings that end the output; as in TGI, the text includes them"),
    means("ignore_eos_token", "continues after the model's end of sequence (LoRAX)"),
    means("truncate", "keeps this many tokens of the prompt, the last ones"),
    means("best_of", "the best of so many outputs; `details` has the others"),
    means("return_full_text", "puts the prompt before the text (default false, also on `/`)"),
    honoured("details"),
    means("decoder_input_details", "adds the prompt's tokens to `details`, not in streams"),
    means("top_n_tokens", "adds so many alternatives for each token: `top_tokens`, 0 to 20"),
    means("return_k_alternatives", "adds so many alternatives to each token: `alternative_tokens`, 1 to 20 (LoRAX)"),
    means("grammar", "`json`, `json_schema` or `regex`, with its `value`"),
    means("response_format", "`json_object` with its `schema` (LoRAX)"),
    refused("watermark", "watermarks are not supported"),
    refused("apply_chat_template", "use POST /v1/chat/completions"),
];

//! What an unknown path was probably meant to be: clients often have a base URL without `/v1`, with two of them, or one of
//! another server.

/// Paths of other servers, and the route here that does the same.
const ALIASES: &[(&str, &str)] = &[
    // Ollama
    ("/api/generate", "/v1/completions"),
    ("/api/chat", "/v1/chat/completions"),
    ("/api/embed", "/v1/embeddings"),
    ("/api/embeddings", "/v1/embeddings"),
    ("/api/tags", "/v1/models"),
    ("/api/show", "/v1/models"),
    ("/api/version", "/version"),
    // OpenAI before /v1/models
    ("/v1/engines", "/v1/models"),
    // llama.cpp
    ("/completion", "/v1/completions"),
    ("/embedding", "/v1/embeddings"),
    ("/props", "/tokenizer_info"),
    ("/slots", "/metrics"),
    ("/apply-template", "/tokenize"),
    // Probes
    ("/healthz", "/health"),
    ("/livez", "/live"),
    ("/readyz", "/ready"),
    ("/ping", "/health"),
];

/// Routes below `/v1`. A route comes before those that its end contains.
const BELOW_V1: &[&str] = &[
    "/chat/completions",
    "/completions",
    "/embeddings",
    "/messages",
    "/messages/count_tokens",
    "/load_lora_adapter",
    "/unload_lora_adapter",
];

/// Routes below `/v1` that go on with an id.
const COLLECTIONS: &[&str] = &["/models", "/files", "/fine_tuning/jobs", "/responses"];

/// Routes without `/v1`.
const AT_ROOT: &[&str] = &[
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/generate",
    "/generate_stream",
    "/info",
    "/lora-adapters",
    "/health",
    "/live",
    "/ready",
    "/version",
    "/metrics",
];

/// The route that an unknown path was probably meant to be.
pub(super) fn meant(path: &str) -> Option<String> {
    // Without slashes at the end, and without double ones, which a base URL with a slash at its end makes.
    let plain: String = path.split('/').filter(|segment| !segment.is_empty()).flat_map(|s| ["/", s]).collect();
    if let Some((_, route)) = ALIASES.iter().find(|(alias, _)| *alias == plain) {
        return Some((*route).to_owned());
    }
    let at_end = |routes: &[&'static str]| routes.iter().copied().find(|route| plain.ends_with(route));
    let below = at_end(BELOW_V1).map(|route| format!("/v1{route}"));
    let inside =
        || COLLECTIONS.iter().find_map(|route| Some(format!("/v1{}", &plain[find_segments(&plain, route)?..])));
    let root = || at_end(AT_ROOT).map(str::to_owned);
    below.or_else(inside).or_else(root).filter(|route| route != path)
}

/// Where the segments of `route` stand in `path`, as a byte offset.
fn find_segments(path: &str, route: &str) -> Option<usize> {
    let whole = |at: &usize| matches!(path.as_bytes().get(at + route.len()), None | Some(b'/'));
    path.match_indices(route).map(|(at, _)| at).find(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_mistakes() {
        for (path, route) in [
            ("/completions", Some("/v1/completions")),
            ("/chat/completions", Some("/v1/chat/completions")),
            ("/embeddings", Some("/v1/embeddings")),
            ("/v1/v1/chat/completions", Some("/v1/chat/completions")),
            ("/v1/chat/completions/", Some("/v1/chat/completions")),
            ("//v1//chat/completions", Some("/v1/chat/completions")),
            ("/api/v1/completions", Some("/v1/completions")),
            ("/v1/engines/davinci/completions", Some("/v1/completions")),
            ("/openai/deployments/x/chat/completions", Some("/v1/chat/completions")),
            ("/models", Some("/v1/models")),
            ("/models/org/base", Some("/v1/models/org/base")),
            ("/v1/v1/files/file-1/content", Some("/v1/files/file-1/content")),
            ("/fine_tuning/jobs", Some("/v1/fine_tuning/jobs")),
            ("/v1/tokenize", Some("/tokenize")),
            ("/health/", Some("/health")),
            ("/api/generate", Some("/v1/completions")),
            ("/api/chat/", Some("/v1/chat/completions")),
            ("/v1/files/file-1/nothing", None),
            ("/my_models", None),
            ("/modelsearch", None),
            ("/v1/nowhere", None),
            ("/", None),
        ] {
            assert_eq!(meant(path).as_deref(), route, "{path}");
        }
    }
}

//! How models write tool calls.

/// The form in which a model writes tool calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// Hermes and Qwen: `<tool_call>` around an object with `name` and `arguments`, or around Qwen3-Coder's
    /// `<function=name><parameter=x>value</parameter></function>`.
    Hermes,
    /// Llama 3: an object with `name` and `parameters` as the whole output, possibly after `<|python_tag|>`. Several calls are
    /// separated by semicolons.
    Llama3,
    /// Mistral up to its third tokenizer: `[TOOL_CALLS]` and an array of objects with `name` and `arguments`.
    Mistral,
    /// Mistral's newer form: `[TOOL_CALLS]name[ARGS]{...}`.
    MistralNamed,
    /// Models without a form of their own: the whole output is an object with `name` and `arguments`, or an array of such
    /// objects, possibly in a Markdown fence.
    Json,
}

impl ToolFormat {
    /// The form of a model, by the source of its chat template.
    pub fn of(template_source: &str) -> Self {
        let has = |text: &str| template_source.contains(text);
        if has("[TOOL_CALLS]") {
            if has("[ARGS]") { Self::MistralNamed } else { Self::Mistral }
        } else if has("<tool_call>") {
            Self::Hermes
        } else if has("<|python_tag|>") || has("<|start_header_id|>") && has("\"parameters\": ") {
            Self::Llama3
        } else {
            Self::Json
        }
    }

    /// The texts that mark calls. Decoding must keep them, also where they are special tokens.
    pub fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &["<tool_call>", "</tool_call>"],
            Self::Llama3 => &["<|python_tag|>"],
            Self::Mistral | Self::MistralNamed => &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
            Self::Json => &[],
        }
    }

    /// The text that begins a call anywhere in the output.
    pub(super) fn opener(self) -> Option<&'static str> {
        self.markers().first().copied()
    }

    /// The text that ends a call which [`ToolFormat::opener`] began.
    pub(super) fn closer(self) -> Option<&'static str> {
        (self == Self::Hermes).then_some("</tool_call>")
    }

    /// Whether JSON at the beginning of the output may be a call.
    pub(super) fn has_bare_calls(self) -> bool {
        matches!(self, Self::Llama3 | Self::Json)
    }
}

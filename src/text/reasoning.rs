//! The thinking that a reasoning model writes before its answer, between `<think>` and `</think>`.

/// The markers around a model's thinking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReasoningFormat {
    /// Begins the thinking.
    pub open: &'static str,
    /// Ends it.
    pub close: &'static str,
}

/// The formats of published models: DeepSeek R1 and Qwen3, ByteDance Seed, Magistral.
const FORMATS: [ReasoningFormat; 3] = [
    ReasoningFormat { open: "<think>", close: "</think>" },
    ReasoningFormat { open: "<seed:think>", close: "</seed:think>" },
    ReasoningFormat { open: "[THINK]", close: "[/THINK]" },
];

impl ReasoningFormat {
    /// The format of a model, by the source of its chat template. `None` if the template knows no thinking.
    pub fn of(template_source: &str) -> Option<Self> {
        // A template may only cut earlier thinking away, for which it needs the second marker alone.
        FORMATS.into_iter().find(|f| template_source.contains(f.open) || template_source.contains(f.close))
    }

    /// The texts that mark the thinking. Decoding must keep them, also where they are special tokens.
    pub fn markers(&self) -> [&'static str; 2] {
        [self.open, self.close]
    }

    /// Whether a prompt ends inside the thinking, so that the output begins there.
    pub fn opened_by(&self, prompt: &str) -> bool {
        prompt.trim_end().ends_with(self.open)
    }
}

/// Separates the thinking at the beginning of an output from its body, in text that comes in pieces. The line ends at the markers
/// belong to the markers: templates write them.
pub(super) struct ReasoningSplitter {
    format: ReasoningFormat,
    at: Place,
    /// Text that is not decided yet.
    held: String,
}

#[derive(Clone, Copy)]
enum Place {
    /// The first marker may come. Without it, the output goes on inside the thinking, or in the body.
    Start { inside: bool },
    /// In the thinking.
    Inside { begun: bool },
    /// In the line ends after the thinking.
    After,
    /// In the answer, to the end.
    Body,
}

/// The new text of an output, of which the thinking comes first.
#[derive(Default)]
pub(super) struct SplitText {
    pub(super) reasoning: String,
    pub(super) body: String,
}

impl ReasoningSplitter {
    pub(super) fn new(format: ReasoningFormat, starts_inside: bool) -> Self {
        Self { format, at: Place::Start { inside: starts_inside }, held: String::new() }
    }

    /// Takes the next piece of text.
    pub(super) fn push(&mut self, text: &str) -> SplitText {
        let mut out = SplitText::default();
        for (at, c) in text.char_indices() {
            if matches!(self.at, Place::Body) {
                out.body.push_str(&text[at..]);
                break;
            }
            self.step(c, &mut out);
        }
        out
    }

    /// The text held back, when the output ends.
    pub(super) fn finish(&mut self) -> SplitText {
        let held = std::mem::take(&mut self.held);
        match self.at {
            Place::Start { inside: true } | Place::Inside { .. } => SplitText { reasoning: held, body: String::new() },
            _ => SplitText { reasoning: String::new(), body: held },
        }
    }

    fn step(&mut self, c: char, out: &mut SplitText) {
        self.held.push(c);
        match self.at {
            Place::Start { inside } => {
                let begin = self.held.trim_start();
                if begin == self.format.open {
                    self.held.clear();
                    self.at = Place::Inside { begun: false };
                } else if !self.format.open.starts_with(begin) {
                    let held = std::mem::take(&mut self.held);
                    if inside {
                        self.at = Place::Inside { begun: false };
                        held.chars().for_each(|c| self.step(c, out));
                    } else {
                        self.at = Place::Body;
                        out.body.push_str(&held);
                    }
                }
            }
            Place::Inside { begun } => self.inside(begun, out),
            Place::After => {
                if c == '\n' {
                    self.held.clear();
                } else {
                    self.at = Place::Body;
                    out.body.push_str(&std::mem::take(&mut self.held));
                }
            }
            Place::Body => out.body.push_str(&std::mem::take(&mut self.held)),
        }
    }

    fn inside(&mut self, begun: bool, out: &mut SplitText) {
        if let Some(text) = self.held.strip_suffix(self.format.close) {
            out.reasoning.push_str(text.trim_end_matches('\n'));
            self.held.clear();
            self.at = Place::After;
            return;
        }
        if !begun && self.held == "\n" {
            self.held.clear();
            return;
        }
        let end = self.held.len() - overlap(&self.held, self.format.close);
        let end = self.held[..end].trim_end_matches('\n').len();
        if end > 0 {
            out.reasoning.extend(self.held.drain(..end));
            self.at = Place::Inside { begun: true };
        }
    }
}

/// Length of the longest suffix of `text` that is a proper prefix of `marker`.
pub(crate) fn overlap(text: &str, marker: &str) -> usize {
    let fits = |n: &usize| marker.is_char_boundary(*n) && text.ends_with(&marker[..*n]);
    (1..marker.len()).rev().find(fits).unwrap_or(0)
}

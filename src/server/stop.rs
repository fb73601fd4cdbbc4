//! Finds stop strings in a stream of text. Text that could be the beginning of a stop string is held back until that is
//! decided.

use crate::text::reasoning::overlap;

/// Looks for stop strings in text that comes in pieces. The result does not depend on how the text was cut. Of several
/// matches, the one that ends first wins; of those, the one that starts first.
pub(super) struct StopMatcher {
    /// Non-empty strings.
    stops: Vec<String>,
    /// Keep the stop string in the text instead of cutting before it.
    include: bool,
    /// Text that may be the beginning of a stop string.
    held: String,
}

/// The result of one more piece of text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StopScan {
    /// Text that may be sent now.
    pub(super) text: String,
    /// Index of the stop string that was found, if any; the text ends there.
    pub(super) stop: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these stop strings.
    pub(super) fn new(stops: Vec<String>, include: bool) -> Self {
        Self { stops, include, held: String::new() }
    }

    /// The stop string at this index.
    pub(super) fn stop(&self, index: usize) -> &str {
        &self.stops[index]
    }

    /// Takes the next piece of text.
    pub(super) fn push(&mut self, piece: &str) -> StopScan {
        self.held.push_str(piece);
        let first = self.stops.iter().enumerate().filter_map(|(i, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, i))
        });
        if let Some((end, start, i)) = first.min() {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(if self.include { end } else { start });
            return StopScan { text, stop: Some(i) };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        StopScan { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// The text held back, when the text ends without a stop string.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[String], include: bool, pieces: &[String]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.to_vec(), include);
        let mut text = String::new();
        for piece in pieces {
            let scanned = matcher.push(piece);
            text.push_str(&scanned.text);
            if let Some(i) = scanned.stop {
                return (text, Some(matcher.stop(i).to_owned()));
            }
        }
        text.push_str(&matcher.finish());
        (text, None)
    }

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn examples() {
        let end = |text: &str, stop: &str| (text.to_owned(), Some(stop.to_owned()));
        assert_eq!(run(&strings(&["END"]), false, &strings(&["a E", "N", "D b"])), end("a ", "END"));
        assert_eq!(run(&strings(&["END"]), true, &strings(&["a E", "N", "D b"])), end("a END", "END"));
        assert_eq!(run(&strings(&["END"]), false, &strings(&["a E", "N", "x"])), ("a ENx".into(), None));
        assert_eq!(run(&strings(&["END"]), false, &strings(&["a EN"])), ("a EN".into(), None));
        assert_eq!(run(&strings(&["abc", "b"]), false, &strings(&["xabc"])), end("xa", "b"));
        assert_eq!(run(&strings(&["b", "ab"]), false, &strings(&["xab"])), end("x", "ab"));
        assert_eq!(run(&strings(&["é"]), false, &strings(&["caf", "é!"])), end("caf", "é"));
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop() {
        let mut matcher = StopMatcher::new(strings(&["\n\nQ:", "###"]), false);
        assert_eq!(matcher.push("a#").text, "a");
        assert_eq!(matcher.push("b\n").text, "#b");
        assert_eq!(matcher.push("\n").text, "");
        assert_eq!(matcher.push("\n").text, "\n");
        assert_eq!(matcher.push("Q").text, "");
        assert_eq!(matcher.push("!").text, "\n\nQ!");
    }

    proptest! {
        #[test]
        fn any_cutting_gives_the_same_text(
            text in "[abé]{0,24}",
            stops in proptest::collection::vec("[abé]{1,4}", 0..4),
            cuts in proptest::collection::vec(0..24usize, 0..12),
            include: bool,
        ) {
            let chars: Vec<char> = text.chars().collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(chars.len())).chain([0, chars.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<String> = cuts.windows(2).map(|w| chars[w[0]..w[1]].iter().collect()).collect();
            prop_assert_eq!(run(&stops, include, &pieces), run(&stops, include, &[text]));
        }

        #[test]
        fn never_gives_out_a_stop_string(text in "[ab]{0,24}", stops in proptest::collection::vec("[ab]{1,4}", 1..4)) {
            let pieces: Vec<String> = text.chars().map(String::from).collect();
            let (out, stop) = run(&stops, false, &pieces);
            prop_assert!(stops.iter().all(|stop| !out.contains(stop.as_str())));
            prop_assert_eq!(stop.is_some(), stops.iter().any(|stop| text.contains(stop.as_str())));
        }
    }
}

//! Scores of answers against reference texts, as the published scripts compute them.

use std::collections::HashMap;
use std::hash::Hash;

use bleuscore::RefLenMethod;
use serde::Serialize;

/// Scores from 0 to 1: means over all pairs of an answer and a reference, and BLEU of the whole corpus.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TextScores {
    /// Number of pairs.
    pub answers: usize,
    /// Fraction of answers that equal the reference character by character, so that `x + 1` differs from `x - 1`.
    pub exact_match: f64,
    /// F1 of lower-case words without punctuation and articles (SQuAD; Rajpurkar et al., 2016).
    pub f1: f64,
    /// Corpus BLEU: up to 4-grams, mteval-v13a tokens, no smoothing (Papineni et al., 2002; Post, 2018).
    pub bleu: f64,
    /// ROUGE-1, the F-measure of single words (Lin, 2004), without stemming.
    pub rouge1: f64,
    /// ROUGE-2, the F-measure of pairs of words.
    pub rouge2: f64,
    /// ROUGE-L, the F-measure of the longest common subsequence.
    pub rouge_l: f64,
}

impl TextScores {
    /// The scores of `(answer, reference)` pairs; `None` without pairs.
    pub fn of(pairs: &[(String, String)]) -> Option<Self> {
        if pairs.is_empty() {
            return None;
        }
        let mean = |score: fn(&str, &str) -> f64| {
            pairs.iter().map(|(answer, reference)| score(answer, reference)).sum::<f64>() / pairs.len() as f64
        };
        let (answers, references): (Vec<_>, Vec<_>) = pairs.iter().map(|(a, r)| (a.clone(), vec![r.clone()])).unzip();
        Some(Self {
            answers: pairs.len(),
            exact_match: mean(|a, r| f64::from(a == r)),
            f1: mean(f1),
            bleu: bleuscore::compute_score(&references, &answers, 4, false, RefLenMethod::Closest).bleu,
            rouge1: mean(|a, r| rouge_n(a, r, 1)),
            rouge2: mean(|a, r| rouge_n(a, r, 2)),
            rouge_l: mean(rouge_l),
        })
    }
}

/// Words as SQuAD's script compares them: lower case, without punctuation and articles.
fn normalised(text: &str) -> Vec<String> {
    let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    text.split_whitespace().filter(|word| !["a", "an", "the"].contains(word)).map(str::to_owned).collect()
}

fn f1(answer: &str, reference: &str) -> f64 {
    let (answer, reference) = (normalised(answer), normalised(reference));
    if answer.is_empty() || reference.is_empty() {
        return f64::from(answer == reference);
    }
    f_measure(common(&answer, &reference), answer.len(), reference.len())
}

/// Words as rouge-score's default tokenizer splits them.
fn rouge_words(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn rouge_n(answer: &str, reference: &str, n: usize) -> f64 {
    let (answer, reference) = (rouge_words(answer), rouge_words(reference));
    let (answer, reference): (Vec<_>, Vec<_>) = (answer.windows(n).collect(), reference.windows(n).collect());
    f_measure(common(&answer, &reference), answer.len(), reference.len())
}

fn rouge_l(answer: &str, reference: &str) -> f64 {
    let (answer, reference) = (rouge_words(answer), rouge_words(reference));
    // Length of the longest common subsequence of the answer so far and each prefix of the reference.
    let mut longest = vec![0; reference.len() + 1];
    for word in &answer {
        let mut diagonal = 0;
        for i in 0..reference.len() {
            let both = if *word == reference[i] { diagonal + 1 } else { longest[i].max(longest[i + 1]) };
            diagonal = std::mem::replace(&mut longest[i + 1], both);
        }
    }
    f_measure(longest[reference.len()], answer.len(), reference.len())
}

/// Size of the intersection of two lists as multisets.
fn common<T: Hash + Eq>(a: &[T], b: &[T]) -> usize {
    let mut left: HashMap<&T, usize> = HashMap::new();
    b.iter().for_each(|item| *left.entry(item).or_default() += 1);
    a.iter().filter(|item| left.get_mut(item).filter(|n| **n > 0).map(|n| *n -= 1).is_some()).count()
}

/// Harmonic mean of `common / a` and `common / b`.
fn f_measure(common: usize, a: usize, b: usize) -> f64 {
    if common == 0 { 0.0 } else { 2.0 * common as f64 / (a + b) as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIRS: [(&str, &str); 6] = [
        ("The cat sat on the mat.", "The cat is sitting on the mat."),
        ("a portable light with a wick", "light in a transparent protective case"),
        ("It's 3.5 km -- isn't it, Tom?", "It is 3.5 km, isn't it, Tom?"),
        ("The Eiffel Tower!", "eiffel tower"),
        ("def f(x):\n    return x + 1", "def f(x):\n    return x - 1"),
        ("\"no\" & <b>, 1,000-fold", "\"no\" & <b>, 1,000-fold"),
    ];

    fn scores(pairs: &[(&str, &str)]) -> TextScores {
        let pairs: Vec<_> = pairs.iter().map(|(a, r)| (a.to_string(), r.to_string())).collect();
        TextScores::of(&pairs).unwrap()
    }

    /// Expected: BLEU of sacrebleu 2.6.0 without smoothing, ROUGE of rouge-score 0.1.2, F1 of SQuAD 2.0's script.
    #[test]
    fn scores_are_those_of_the_published_scripts() {
        let close = |score: f64, expected: f64| assert!((score - expected).abs() < 1e-9, "{score} and not {expected}");
        let all = scores(&PAIRS);
        assert_eq!(all.answers, 6);
        close(all.exact_match, 1.0 / 6.0);
        close(all.f1, 0.7763532763532762);
        close(all.bleu, 0.6211706157988152);
        close(all.rouge1, 0.7985754985754986);
        close(all.rouge2, 0.6603535353535354);
        close(all.rouge_l, 0.7985754985754986);
        close(scores(&PAIRS[..1]).bleu, 0.4238365628278778);
        close(scores(&PAIRS[2..3]).bleu, 0.4593613320783059);
        close(scores(&[("the dog the cat ate", "the cat the dog ate")]).rouge_l, 0.6);
    }

    #[test]
    fn an_empty_answer_scores_nothing() {
        let TextScores { exact_match, f1, bleu, rouge1, rouge2, rouge_l, .. } = scores(&[("", "x")]);
        assert_eq!([exact_match, f1, bleu, rouge1, rouge2, rouge_l], [0.0; 6]);
        assert_eq!(TextScores::of(&[]), None);
    }
}

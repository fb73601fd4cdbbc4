//! The traffic of a run: arrivals, lengths, prompts and adapter popularity, all from one seed.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use rand::distr::weighted::WeightedIndex;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Gamma, LogNormal};
use rand_pcg::Pcg64;
use serde_json::Value;

use crate::{Error, Result};

/// When requests are due.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arrivals {
    /// Open loop: requests arrive at random, independent of the server.
    Open {
        /// Requests per second.
        rate: f64,
        /// Coefficient of variation of the gaps, which are Gamma distributed: 1 is a Poisson process, 0 a constant gap.
        cv: f64,
    },
    /// Closed loop: each client sends its next request after the reply to its last one.
    Closed {
        /// Number of clients.
        clients: usize,
    },
}

/// Distribution of a number of tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    /// Constant.
    Fixed(usize),
    /// Uniform between two numbers, both inclusive.
    Uniform(usize, usize),
    /// Log-normal.
    LogNormal {
        /// Median.
        median: f64,
        /// Standard deviation of the logarithm.
        sigma: f64,
        /// Upper limit; larger values are clamped to it.
        max: usize,
    },
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || "write 128, 8..512 or lognormal:MEDIAN:SIGMA:MAX, with lengths of at least 1".to_owned();
        let whole = |text: &str| text.parse().ok().filter(|n| *n > 0).ok_or_else(usage);
        if let Some((low, high)) = text.split_once("..") {
            let (low, high) = (whole(low)?, whole(high)?);
            return if low <= high { Ok(Self::Uniform(low, high)) } else { Err(usage()) };
        }
        let Some(parts) = text.strip_prefix("lognormal:") else { return Ok(Self::Fixed(whole(text)?)) };
        let [median, sigma, max] = parts.split(':').collect::<Vec<_>>()[..] else { return Err(usage()) };
        let number = |text: &str| text.parse::<f64>().ok().filter(|n| n.is_finite() && *n >= 0.0).ok_or_else(usage);
        Ok(Self::LogNormal { median: number(median)?.max(1.0), sigma: number(sigma)?, max: whole(max)? })
    }
}

impl Lengths {
    fn draw(self, rng: &mut Pcg64) -> usize {
        match self {
            Self::Fixed(n) => n,
            Self::Uniform(low, high) => rng.random_range(low..=high),
            Self::LogNormal { median, sigma, max } => {
                // Parsing has checked the parameters: finite and positive.
                let length = LogNormal::new(median.ln(), sigma).map_or(median, |d| d.sample(rng));
                (length.round() as usize).clamp(1, max)
            }
        }
    }
}

/// How requests choose adapters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Popularity {
    /// At random, all equally likely.
    Uniform,
    /// At random: the i-th adapter has weight `i^-alpha`.
    Zipf(f64),
    /// S-LoRA's power law: adapter `floor(n · u^(1/alpha))` for uniform `u`. 1 is uniform; smaller values are more skewed.
    Power(f64),
    /// At random: each adapter has this many times the requests of the next one. Punica and SGLang call this Zipf.
    Geometric(f64),
    /// In turn, so that consecutive requests have different adapters.
    Distinct,
    /// All requests use the first adapter.
    One,
}

impl FromStr for Popularity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage = "write uniform, distinct, one, zipf:ALPHA, power:ALPHA or geometric:RATIO, with a number above 0";
        let number =
            |text: &str| text.parse::<f64>().ok().filter(|a| a.is_finite() && *a > 0.0).ok_or(usage.to_owned());
        match text.split_once(':') {
            None if text == "uniform" => Ok(Self::Uniform),
            None if text == "distinct" => Ok(Self::Distinct),
            None if text == "one" => Ok(Self::One),
            Some(("zipf", alpha)) => Ok(Self::Zipf(number(alpha)?)),
            Some(("power", alpha)) => Ok(Self::Power(number(alpha)?)),
            Some(("geometric", ratio)) => Ok(Self::Geometric(number(ratio)?)),
            _ => Err(usage.to_owned()),
        }
    }
}

impl Popularity {
    /// Weights of `n` adapters, not normalised; `None` if the choice is not random.
    pub(super) fn weights(self, n: usize) -> Option<Vec<f64>> {
        let weight = |i: usize| match self {
            Self::Zipf(alpha) => Some((i as f64 + 1.0).powf(-alpha)),
            Self::Power(alpha) => Some(((i + 1) as f64 / n as f64).powf(alpha) - (i as f64 / n as f64).powf(alpha)),
            Self::Geometric(ratio) => Some(ratio.powf(-(i as f64))),
            Self::Uniform => Some(1.0),
            Self::Distinct | Self::One => None,
        };
        (0..n).map(weight).collect()
    }
}

/// The content of prompts.
#[derive(Debug, Clone)]
pub enum Prompts {
    /// Random token ids below this number. Lengths are exact. For servers that take ids as prompts.
    Tokens(u32),
    /// Common English words, about one token each.
    Words,
    /// First turns of conversations with the tokens of their replies, in place of [`Lengths`].
    Conversations(Vec<(String, usize)>),
}

/// Estimated characters per token of English text. The generator has no tokenizer to measure conversations with.
const CHARACTERS_A_TOKEN: usize = 4;

/// Words that are one token in nearly every vocabulary.
const WORDS: &str = "the of and to in is that for it was on are as with his they at be this from have or by one had \
                     not but what all were when we there can an your which their said if do will each about how up out \
                     them then she many some so these would other into has more her two like him see time could no \
                     make than first been its who now people my made over did down only way find use may water long \
                     little very after words called just where most know";

impl Prompts {
    /// Reads a file in ShareGPT's format: an array of `{"conversations": [{"value": prompt}, {"value": reply}, ...]}`. As in
    /// vLLM's benchmark, it skips pairs with fewer than 4 or more than 1024 tokens in prompt or reply, or more than 2048 in total.
    /// Errors: no pair is left.
    pub fn share_gpt(file: &Path) -> Result<Self> {
        let fail = |what: String| Error::invalid(format!("{}: {what}", file.display()));
        let text = std::fs::read(file).map_err(|e| fail(e.to_string()))?;
        let list: Value = serde_json::from_slice(&text).map_err(|e| fail(e.to_string()))?;
        let pair = |entry: &Value| {
            let turn = |i: usize| entry["conversations"][i]["value"].as_str();
            let (prompt, reply) = (turn(0)?, turn(1)?);
            let [input, output] = [prompt, reply].map(|text| text.chars().count().div_ceil(CHARACTERS_A_TOKEN));
            let fits = (4..=1024).contains(&input) && (4..=1024).contains(&output) && input + output <= 2048;
            fits.then(|| (prompt.to_owned(), output))
        };
        let pairs: Vec<_> = list.as_array().into_iter().flatten().filter_map(pair).collect();
        if pairs.is_empty() {
            return Err(fail("no conversation in ShareGPT's format with a suitable length".into()));
        }
        Ok(Self::Conversations(pairs))
    }
}

/// Everything that determines the requests of a run.
#[derive(Debug, Clone)]
pub struct Traffic {
    /// Arrival process.
    pub arrivals: Arrivals,
    /// Tokens of a prompt.
    pub input: Lengths,
    /// Tokens of a reply.
    pub output: Lengths,
    /// The content of prompts.
    pub prompts: Prompts,
    /// Number of adapters in use; 0 is the base alone.
    pub adapters: usize,
    /// How requests choose among the adapters.
    pub popularity: Popularity,
    /// The same seed gives the same traffic.
    pub seed: u64,
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.arrivals {
            Arrivals::Open { rate, cv } => write!(f, "open loop, {rate:.3} requests/s, cv {cv}")?,
            Arrivals::Closed { clients } => write!(f, "closed loop, {clients} clients")?,
        }
        match &self.prompts {
            Prompts::Conversations(pairs) => write!(f, ", {} conversations", pairs.len())?,
            Prompts::Tokens(_) => write!(f, ", token ids, in {:?}, out {:?}", self.input, self.output)?,
            Prompts::Words => write!(f, ", words, in {:?}, out {:?}", self.input, self.output)?,
        }
        write!(f, ", {} adapters, {:?}, seed {}", self.adapters, self.popularity, self.seed)
    }
}

/// A request to send.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedRequest {
    /// Time at which it is due, from the start of the run; always 0 in a closed loop.
    pub due: Duration,
    /// Text or token ids.
    pub prompt: Value,
    /// Tokens of the reply.
    pub output: usize,
    /// Index of its adapter.
    pub adapter: Option<usize>,
}

/// The endless sequence of a traffic's requests.
pub struct TrafficPlan {
    traffic: Traffic,
    rng: Pcg64,
    /// Gaps in seconds; `None` in a closed loop or if all gaps are equal.
    gaps: Option<Gamma<f64>>,
    /// Random choice of an adapter; `None` if the choice is not random.
    choice: Option<WeightedIndex<f64>>,
    /// Number of requests so far.
    count: usize,
    /// Time at which the last request was due.
    due: Duration,
}

impl Traffic {
    /// The requests in order. Errors: invalid parameters of the arrival process or of the popularity.
    pub fn plan(&self) -> Result<TrafficPlan> {
        let fail = |e: &dyn std::fmt::Display| Error::invalid(format!("traffic: {e}"));
        let gaps = match self.arrivals {
            Arrivals::Open { rate, cv } if cv > 0.0 => {
                Some(Gamma::new(1.0 / (cv * cv), cv * cv / rate).map_err(|e| fail(&e))?)
            }
            Arrivals::Open { .. } | Arrivals::Closed { .. } => None,
        };
        let weights = self.popularity.weights(self.adapters).filter(|weights| !weights.is_empty());
        let choice = weights.map(WeightedIndex::new).transpose().map_err(|e| fail(&e))?;
        let rng = Pcg64::seed_from_u64(self.seed);
        Ok(TrafficPlan { traffic: self.clone(), rng, gaps, choice, count: 0, due: Duration::ZERO })
    }
}

impl Iterator for TrafficPlan {
    type Item = PlannedRequest;

    fn next(&mut self) -> Option<PlannedRequest> {
        let (traffic, rng) = (&self.traffic, &mut self.rng);
        if let Arrivals::Open { rate, .. } = traffic.arrivals {
            let gap = self.gaps.as_ref().map_or(1.0 / rate, |gaps| gaps.sample(rng));
            self.due += Duration::try_from_secs_f64(gap).ok()?;
        }
        let adapter = match (traffic.adapters, &self.choice) {
            (0, _) => None,
            (_, Some(choice)) => Some(choice.sample(rng)),
            (n, None) if traffic.popularity == Popularity::Distinct => Some(self.count % n),
            (_, None) => Some(0),
        };
        let (input, output) = (traffic.input.draw(rng), traffic.output.draw(rng));
        let (prompt, output) = match &traffic.prompts {
            Prompts::Tokens(below) => ((0..input).map(|_| rng.random_range(0..*below)).collect(), output),
            Prompts::Words => {
                let words: Vec<&str> = WORDS.split_whitespace().collect();
                let text: Vec<&str> = (0..input).map(|_| words[rng.random_range(0..words.len())]).collect();
                (text.join(" ").into(), output)
            }
            Prompts::Conversations(pairs) => {
                let (prompt, output) = &pairs[rng.random_range(0..pairs.len())];
                (prompt.as_str().into(), *output)
            }
        };
        self.count += 1;
        Some(PlannedRequest { due: self.due, prompt, output, adapter })
    }
}

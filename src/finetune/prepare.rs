//! What a job needs before it can run: its files read, its settings chosen, and where its adapter comes from.

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::settings;
use crate::Result;
use crate::fields::Fields;
use crate::hub::hex;
use crate::text::codec::TextCodec;
use crate::train::data::{self, Dataset};
use crate::train::spec::JobSpec;

/// A job's files and settings.
pub struct Prepared {
    pub train: Dataset,
    pub valid: Option<Dataset>,
    pub spec: JobSpec,
}

/// Reads the files under `settings` (an object as [`settings::spec`] takes it) and chooses what is left open. `longest` bounds
/// the length of examples.
///
/// # Errors
/// `Invalid`: a setting, by its name, or a file, as `training_file` or `validation_file` with the lines.
pub fn prepare(
    codec: &TextCodec,
    settings: &Value,
    longest: usize,
    train: &[u8],
    valid: Option<&[u8]>,
) -> Result<Prepared> {
    let fields = Fields::of_body(settings)?;
    let options = settings::data_options(&fields, &settings::spec(&fields, longest, None)?)?;
    let read = |bytes: &[u8], param: &str| data::parse(bytes, codec, &options).map_err(|e| e.param(param));
    let train = read(train, "training_file")?;
    let valid = valid.map(|bytes| read(bytes, "validation_file")).transpose()?;
    let spec = settings::spec(&fields, longest, Some(&train))?;
    Ok(Prepared { train, valid, spec })
}

impl Prepared {
    /// What a person should know of the files, a sentence each.
    pub fn notes(&self) -> Vec<String> {
        let files = [("training", Some(&self.train)), ("validation", self.valid.as_ref())];
        let mut notes = Vec::new();
        for (name, data) in files.into_iter().filter_map(|(name, data)| Some((name, data?))) {
            let counts = &data.statistics;
            if counts.truncated > 0 {
                let most = self.spec.max_length;
                notes.push(format!(
                    "{} of {} {name} examples were cut at {most} tokens",
                    counts.truncated, counts.examples
                ));
            }
            if counts.dropped > 0 {
                notes.push(format!("{} {name} examples were left out: nothing in them is trained", counts.dropped));
            }
        }
        notes
    }
}

/// What an adapter's config says of where it comes from, beside PEFT's keys: base, tokenizer and template it was trained with,
/// and how its prompts were written.
pub fn provenance(base: &str, fingerprint: &str, codec: &TextCodec, data: &Dataset) -> Result<Map<String, Value>> {
    let (tokenizer, template) = codec.sources()?;
    let hash = |text: String| hex(&Sha256::digest(text));
    let ours = json!({
        "base_fingerprint": fingerprint,
        "tokenizer_sha256": hash(tokenizer),
        "chat_template_sha256": template.map(hash),
        "data_format": data.format,
        "alpaca_ending": data.alpaca_ending,
    });
    Ok([("base_model_name_or_path".to_owned(), base.into()), ("quiver".to_owned(), ours)].into_iter().collect())
}

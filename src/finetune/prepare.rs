//! Preparation of a job: its files are parsed, its settings are chosen, and the provenance of its adapter is noted.

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::settings;
use crate::Result;
use crate::fields::Fields;
use crate::hub::hex;
use crate::text::codec::TextCodec;
use crate::train::data::{self, Dataset};
use crate::train::spec::JobSpec;

/// A job's parsed files and final settings.
pub struct Prepared {
    pub train: Dataset,
    pub valid: Option<Dataset>,
    pub spec: JobSpec,
}

/// Parses the files of a job and chooses the settings that are not given. `settings` is an object as in [`settings::spec`];
/// `longest` bounds the length of examples in tokens.
///
/// # Errors
/// `Invalid`: a setting, with its name; a file, as `training_file` or `validation_file`, with the wrong lines.
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
    /// Remarks on the files for the user, one sentence each.
    pub fn remarks(&self) -> Vec<String> {
        let files = [("training", Some(&self.train)), ("validation", self.valid.as_ref())];
        let mut remarks = Vec::new();
        for (name, data) in files.into_iter().filter_map(|(name, data)| Some((name, data?))) {
            let counts = &data.statistics;
            if counts.truncated > 0 {
                let most = self.spec.max_length;
                remarks.push(format!(
                    "{} of {} {name} examples were cut at {most} tokens",
                    counts.truncated, counts.examples
                ));
            }
            if counts.dropped > 0 {
                remarks
                    .push(format!("{} {name} examples were dropped: they have no token to train on", counts.dropped));
            }
        }
        remarks
    }
}

/// The keys of `adapter_config.json` that say where an adapter comes from: base, tokenizer and chat template, and the format of
/// the training file. Errors: the tokenizer cannot be read.
pub fn provenance(base: &str, fingerprint: &str, codec: &TextCodec, data: &Dataset) -> Result<Map<String, Value>> {
    let (tokenizer, template) = codec.sources()?;
    let hash = |text: &str| hex(&Sha256::digest(text));
    let quiver = json!({
        "base_fingerprint": fingerprint,
        "tokenizer_sha256": hash(&tokenizer),
        "chat_template_sha256": template.map(hash),
        "data_format": data.format,
        "alpaca_ending": data.alpaca_ending,
    });
    Ok([("base_model_name_or_path".to_owned(), base.into()), ("quiver".to_owned(), quiver)].into_iter().collect())
}

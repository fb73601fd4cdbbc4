//! The tensors of a model on disk: listed by name, and each read once.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};

use super::bnb::BnbTensors;
use crate::ops::pool::parallel_for;
use crate::ops::quant::{Codec, Source};
use crate::{Error, Result};

/// A tensor's place, encoding and shape.
pub struct TensorEntry {
    /// The name in the file, for messages.
    pub label: String,
    /// The encoding of its bytes.
    pub encoding: TensorEncoding,
    /// Outermost dimension first: `[out, in]` for a matrix.
    pub shape: Vec<usize>,
    /// Index of its file in [`ModelTensors`].
    pub file: usize,
    /// First byte in that file.
    pub offset: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// Number of heads, if the writer interleaved the rows of each head for its own RoPE, as llama.cpp does for q and k.
    /// Reading undoes it.
    pub interleaved_heads: Option<usize>,
}

/// The encoding of a tensor's bytes.
pub enum TensorEncoding {
    /// Values, or blocks of them.
    Values(Codec),
    /// 4-bit codes of bitsandbytes, whose scales are other tensors.
    Bnb(Box<BnbTensors>),
    /// Bytes that mean something only together with another tensor.
    Bytes,
}

impl TensorEncoding {
    /// For messages and the fingerprint.
    pub fn name(&self) -> String {
        match self {
            Self::Values(codec) => format!("{codec:?}"),
            Self::Bnb(_) => "4-bit".to_string(),
            Self::Bytes => "U8".to_string(),
        }
    }
}

/// The rows of a matrix in memory.
pub struct MatrixRows {
    /// The values as they are stored, for packing.
    pub source: Source<'static>,
    /// The name in the file, for messages.
    label: String,
}

impl MatrixRows {
    /// The values, if they are stored as floats.
    pub fn floats(&self) -> Result<Vec<f32>> {
        let quantised = |encoding: String| {
            Error::invalid(format!(
                "tensor {} is {encoding}, expected F32, F16 or BF16 (weights that are quantised already are not quantised \
                 again)",
                self.label
            ))
        };
        let Source::Blocks { codec, bytes, .. } = &self.source else { return Err(quantised("4-bit".to_string())) };
        match codec {
            Codec::F32 => Ok(convert(bytes, f32::from_le_bytes)),
            Codec::F16 => Ok(convert(bytes, |b| f16::from_le_bytes(b).to_f32())),
            Codec::BF16 => Ok(convert(bytes, |b| bf16::from_le_bytes(b).to_f32())),
            other => Err(quantised(format!("{other:?}"))),
        }
    }
}

/// Converts each `N` bytes to a value, on all threads.
fn convert<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f32> {
    // Values per task.
    const PART: usize = 1 << 20;
    let (all, _) = bytes.as_chunks::<N>();
    let mut values = vec![0.0; all.len()];
    let parts: Vec<_> = values.chunks_mut(PART).zip(all.chunks(PART)).map(Mutex::new).collect();
    parallel_for(parts.len(), |i| {
        let (values, bytes) = &mut *parts[i].lock().unwrap_or_else(PoisonError::into_inner);
        values.iter_mut().zip(*bytes).for_each(|(to, bytes)| *to = value(*bytes));
    });
    values
}

/// All tensors of a model under Hugging Face's names. Reading takes a tensor out, so a tensor that is left at the end was
/// not understood.
pub struct ModelTensors {
    files: Vec<(PathBuf, File)>,
    entries: BTreeMap<String, TensorEntry>,
    /// Turns a Hugging Face name into this format's own, for messages.
    own_name: fn(&str) -> String,
}

impl ModelTensors {
    /// An empty list.
    pub fn new(own_name: fn(&str) -> String) -> Self {
        Self { files: Vec::new(), entries: BTreeMap::new(), own_name }
    }

    /// Adds a file. Returns its index for [`TensorEntry::file`].
    pub fn add_file(&mut self, path: &Path, file: File) -> usize {
        self.files.push((path.to_path_buf(), file));
        self.files.len() - 1
    }

    /// Adds a tensor. Errors: bytes outside its file, a name that is listed already.
    pub fn add(&mut self, name: String, entry: TensorEntry) -> Result<()> {
        let (path, file) = &self.files[entry.file];
        let length = file.metadata()?.len();
        if entry.offset.checked_add(entry.bytes).is_none_or(|end| end > length) {
            return Err(Error::invalid(format!(
                "{} is truncated: tensor {} needs {} bytes at {}, the file ends at {length}",
                path.display(),
                entry.label,
                entry.bytes,
                entry.offset
            )));
        }
        if let Some(other) = self.entries.insert(name, entry) {
            return Err(Error::invalid(format!("{}: tensor {} is listed twice", self.path(), other.label)));
        }
        Ok(())
    }

    /// The shape of a tensor, without taking it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|e| e.shape.as_slice())
    }

    /// Drops a tensor that is not needed, if it is listed.
    pub fn ignore(&mut self, name: &str) {
        self.entries.remove(name);
    }

    /// The names of the tensors that are left.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Takes a tensor of any shape without reading it.
    pub fn remove(&mut self, name: &str) -> Option<TensorEntry> {
        self.entries.remove(name)
    }

    /// Takes and reads a matrix, which must be `[n, k]`.
    pub fn rows(&mut self, name: &str, n: usize, k: usize) -> Result<MatrixRows> {
        let entry = self.take(name, &[n, k])?;
        self.decode(entry, n, k)
    }

    /// Takes and reads a vector of `len` floats.
    pub fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let entry = self.take(name, &[len])?;
        self.decode(entry, 1, len)?.floats()
    }

    fn decode(&self, entry: TensorEntry, n: usize, k: usize) -> Result<MatrixRows> {
        let mut bytes = self.read(&entry)?;
        if let Some(heads) = entry.interleaved_heads {
            bytes = separate_halves(&bytes, n, heads);
        }
        let source = match &entry.encoding {
            TensorEncoding::Values(codec) => Source::Blocks { codec: *codec, n, k, bytes: Cow::Owned(bytes) },
            TensorEncoding::Bnb(tensors) => tensors.source(n, k, bytes, self)?,
            TensorEncoding::Bytes => {
                return Err(Error::invalid(format!(
                    "{}: tensor {} is U8, expected floats or quantised values",
                    self.path(),
                    entry.label
                )));
            }
        };
        Ok(MatrixRows { source, label: entry.label })
    }

    /// Checks that all tensors were taken. Errors: a tensor that was not.
    pub fn finish(&self) -> Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = self.entries.values().map(|e| e.label.as_str()).take(8).collect();
        Err(Error::invalid(format!(
            "{} has {} tensors that this decoder does not use: {}{}",
            self.path(),
            self.entries.len(),
            names.join(", "),
            if self.entries.len() > names.len() { ", ..." } else { "" }
        )))
    }

    /// Passes `feed` the description of each tensor, and pages from its beginning, middle and end, in the order of names.
    pub fn sample(&self, mut feed: impl FnMut(&[u8])) -> Result<()> {
        const PAGE: u64 = 4096;
        for (name, entry) in &self.entries {
            feed(format!("{name} {} {:?}\n", entry.encoding.name(), entry.shape).as_bytes());
            let mut parts = vec![entry];
            if let TensorEncoding::Bnb(tensors) = &entry.encoding {
                feed(tensors.settings().as_bytes());
                parts.extend(tensors.entries());
            }
            for entry in parts {
                let last = entry.bytes.saturating_sub(PAGE);
                let mut starts = vec![0, last / 2, last];
                starts.dedup();
                for start in starts {
                    feed(&self.read_at(entry, start, PAGE.min(entry.bytes))?);
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<TensorEntry> {
        let entry = self
            .entries
            .remove(name)
            .ok_or_else(|| Error::invalid(format!("{} has no tensor {}", self.path(), (self.own_name)(name))))?;
        if entry.shape != shape {
            return Err(Error::invalid(format!(
                "{}: tensor {} is {:?}, expected {shape:?}",
                self.path(),
                entry.label,
                entry.shape
            )));
        }
        Ok(entry)
    }

    /// Reads a tensor that was taken.
    pub fn read(&self, entry: &TensorEntry) -> Result<Vec<u8>> {
        self.read_at(entry, 0, entry.bytes)
    }

    /// Reads instead of mapping the file: nothing of it stays resident, and a file that shrinks meanwhile is an error instead of
    /// a signal.
    fn read_at(&self, entry: &TensorEntry, start: u64, len: u64) -> Result<Vec<u8>> {
        let (path, mut file) = (&self.files[entry.file].0, &self.files[entry.file].1);
        let mut bytes = vec![0; len as usize];
        file.seek(SeekFrom::Start(entry.offset + start))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(|e| Error::invalid(format!("tensor {}: {e}", entry.label)).in_file(path).caused_by(e))?;
        Ok(bytes)
    }

    /// The path of the file, or of the directory if there are several.
    fn path(&self) -> String {
        match &self.files[..] {
            [] => "the model".to_string(),
            [(path, _)] => path.display().to_string(),
            [(path, _), ..] => path.parent().unwrap_or(path).display().to_string(),
        }
    }
}

/// Undoes llama.cpp's order of the rows of q and k. Its RoPE rotates neighbouring rows where Hugging Face's rotates the two
/// halves of a head, so its converter interleaves the halves: the first row of each, then the second of each, and so on.
pub(crate) fn separate_halves(bytes: &[u8], n: usize, heads: usize) -> Vec<u8> {
    let row = bytes.len() / n;
    let half = n / heads / 2;
    let mut out = Vec::with_capacity(bytes.len());
    for head in 0..heads {
        for part in 0..2 {
            for i in 0..half {
                let from = (head * half + i) * 2 + part;
                out.extend_from_slice(&bytes[from * row..(from + 1) * row]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::separate_halves;

    #[test]
    fn halves_are_separated_per_head() {
        // The converter's own step, on row numbers: reshape (heads, 2, half), swap the last two, flatten.
        let (heads, half) = (3, 4);
        let mut stored = Vec::new();
        for head in 0..heads {
            for i in 0..half {
                for part in 0..2 {
                    let row = (head * 2 + part) * half + i;
                    stored.extend([row as u8, 100 + row as u8]);
                }
            }
        }
        let rows: Vec<u8> = (0..heads * half * 2).flat_map(|r| [r as u8, 100 + r as u8]).collect();
        assert_eq!(separate_halves(&stored, 24, heads), rows);
    }
}

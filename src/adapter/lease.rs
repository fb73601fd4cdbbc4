//! Leases on generations.

use std::ops::Deref;
use std::sync::Arc;

use super::Generation;

/// A reference that keeps a generation alive while a request uses it: replacing or unloading the adapter does not disturb
/// the request. A clone is one more lease.
pub struct Lease(Arc<Generation>);

impl Lease {
    /// One more lease on `generation`.
    pub fn new(generation: Arc<Generation>) -> Self {
        generation.state.add_lease();
        Self(generation)
    }

    /// The generation, for work that may outlive the lease.
    pub(super) fn generation(&self) -> Arc<Generation> {
        self.0.clone()
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        Self::new(self.0.clone())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The last lease of a retired generation also drops the generation, which notifies the tiers.
        self.0.state.end_lease();
    }
}

impl Deref for Lease {
    type Target = Generation;

    fn deref(&self) -> &Generation {
        &self.0
    }
}

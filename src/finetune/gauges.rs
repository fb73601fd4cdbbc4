//! Metrics of jobs for the metrics page.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::record::{JobRecord, JobStatus};

/// Number of ended jobs that stay on the metrics page.
const SHOWN_ENDED: usize = 50;

/// Metrics of one job.
#[derive(Debug, Clone)]
pub struct JobGauge {
    pub id: String,
    pub status: JobStatus,
    /// Optimiser steps done.
    pub step: usize,
    /// Optimiser steps in all; 0 until the job runs.
    pub steps: usize,
    /// Of the last step.
    pub train_loss: Option<f64>,
    /// Of the last validation.
    pub valid_loss: Option<f64>,
    /// Of the last step.
    pub tokens_per_second: Option<f64>,
}

/// Metrics of all jobs on the page, by id; clones share them.
#[derive(Clone, Default)]
pub(super) struct JobGauges(Arc<Mutex<BTreeMap<String, JobGauge>>>);

impl JobGauges {
    pub(super) fn all(&self) -> Vec<JobGauge> {
        self.lock().values().cloned().collect()
    }

    /// Puts a job on the page, or updates its status and steps. Takes the first ended jobs off where there are too many.
    pub(super) fn show(&self, record: &JobRecord) {
        let mut gauges = self.lock();
        let gauge = gauges.entry(record.id.clone()).or_insert_with(|| JobGauge {
            id: record.id.clone(),
            status: record.status,
            step: 0,
            steps: 0,
            train_loss: None,
            valid_loss: None,
            tokens_per_second: None,
        });
        (gauge.status, gauge.step, gauge.steps) = (record.status, record.done, record.steps);
        let ended: Vec<String> = gauges.values().filter(|g| g.status.ended()).map(|g| g.id.clone()).collect();
        for id in ended.iter().take(ended.len().saturating_sub(SHOWN_ENDED)) {
            gauges.remove(id);
        }
    }

    /// Changes the metrics of a job, if it is on the page.
    pub(super) fn update(&self, id: &str, change: impl FnOnce(&mut JobGauge)) {
        if let Some(gauge) = self.lock().get_mut(id) {
            change(gauge);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, JobGauge>> {
        // Metrics are complete between statements, so those of a thread that panicked can be used.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! What the guard remembers: read when somebody looks, so that nothing is counted twice on the way of a login.

use prometheus::IntGaugeVec;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

/// A gauge that asks.
pub(super) struct Measured<F> {
    gauges: IntGaugeVec,
    read: F,
}

impl<F: Fn() -> Vec<(&'static str, usize)> + Send + Sync> Measured<F> {
    pub(super) fn new(gauges: IntGaugeVec, read: F) -> Self {
        Self { gauges, read }
    }
}

impl<F: Fn() -> Vec<(&'static str, usize)> + Send + Sync> Collector for Measured<F> {
    fn desc(&self) -> Vec<&Desc> {
        self.gauges.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        for (table, entries) in (self.read)() {
            self.gauges.with_label_values(&[table]).set(i64::try_from(entries).unwrap_or(i64::MAX));
        }
        self.gauges.collect()
    }
}

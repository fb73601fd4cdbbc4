//! Every Prometheus metric name, once.

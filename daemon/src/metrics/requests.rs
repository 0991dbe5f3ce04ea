//! Request counts and latencies.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Method {
    service: String,
    method: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answer {
    service: String,
    method: String,
    code: &'static str,
}

#[derive(Debug)]
pub struct RequestMetrics {
    /// Paths of the methods that exist: a client cannot invent label values.
    methods: BTreeMap<String, Method>,
    answers: Family<Answer, Counter>,
    latency: Family<Method, Histogram, fn() -> Histogram>,
    in_flight: Gauge,
}

fn histogram() -> Histogram {
    // 250 us to 8 s: a published read to a deadline.
    Histogram::new((0..16).map(|i| 0.000_25 * f64::from(1u32 << i)))
}

impl RequestMetrics {
    pub fn register(registry: &mut Registry) -> Arc<Self> {
        let methods = nestd_proto::json::pool().services().flat_map(|service| {
            let name = service.full_name().to_owned();
            let one = |method: &str| {
                (format!("/{name}/{method}"), Method { service: name.clone(), method: method.to_owned() })
            };
            service.methods().map(|m| one(m.name())).collect::<Vec<_>>()
        });
        let metrics = Self {
            methods: methods.collect(),
            answers: Family::default(),
            latency: Family::new_with_constructor(histogram as fn() -> Histogram),
            in_flight: Gauge::default(),
        };
        let registry = registry.sub_registry_with_prefix("nestd_requests");
        registry.register("answered", "Calls by method and gRPC status code", metrics.answers.clone());
        registry.register_with_unit(
            "latency",
            "From a call's arrival to its answer; of a stream, to its first headers",
            Unit::Seconds,
            metrics.latency.clone(),
        );
        registry.register("in_flight", "Calls not answered yet", metrics.in_flight.clone());
        Arc::new(metrics)
    }

    /// A call on this path arrived. Dropping what it gives back without an answer counts a client that left.
    pub fn begin(self: &Arc<Self>, path: &str) -> InFlight {
        self.in_flight.inc();
        let method = self
            .methods
            .get(path)
            .cloned()
            .unwrap_or_else(|| Method { service: "other".into(), method: "other".into() });
        InFlight { metrics: self.clone(), method, code: "CANCELLED", started: std::time::Instant::now() }
    }
}

pub struct InFlight {
    metrics: Arc<RequestMetrics>,
    method: Method,
    code: &'static str,
    started: std::time::Instant,
}

impl InFlight {
    /// The call was answered with this status code.
    pub fn answered(mut self, code: &'static str) -> Duration {
        self.code = code;
        self.started.elapsed()
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let Method { service, method } = self.method.clone();
        self.metrics.answers.get_or_create(&Answer { service, method, code: self.code }).inc();
        self.metrics.latency.get_or_create(&self.method).observe(self.started.elapsed().as_secs_f64());
        self.metrics.in_flight.dec();
    }
}

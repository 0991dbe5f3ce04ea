//! What every call passes through: a deadline, and its count and latency.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tonic::{
    Code, Status,
    body::Body,
    codegen::http::{HeaderMap, Request, Response},
};
use tower::{Layer, Service};

use crate::metrics::RequestMetrics;

#[derive(Clone)]
pub struct Calls {
    pub metrics: Arc<RequestMetrics>,
    /// The longest that a call may take to its answer, or a stream to its headers.
    pub longest: Duration,
}

impl<S> Layer<S> for Calls {
    type Service = Watched<S>;
    fn layer(&self, inner: S) -> Watched<S> {
        Watched { calls: self.clone(), inner }
    }
}

#[derive(Clone)]
pub struct Watched<S> {
    calls: Calls,
    inner: S,
}

impl<S> Service<Request<Body>> for Watched<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let in_flight = self.calls.metrics.begin(request.uri().path());
        let path = request.uri().path().to_owned();
        let longest = self.calls.longest;
        // tonic's own timer for grpc-timeout answers CANCELLED, and no deadline of the daemon's at all: ours
        // comes first and answers what gRPC says.
        let deadline = client_deadline(request.headers())
            .map_or(longest, |d| d.saturating_sub(Duration::from_millis(2)).min(longest));
        // The clone is not ready, the original is: that one has to take the call.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        Box::pin(async move {
            let answer = match deadline {
                // Too late to begin.
                Duration::ZERO => None,
                deadline => tokio::time::timeout(deadline, inner.call(request)).await.ok(),
            };
            let response = match answer {
                Some(response) => response?,
                None => Status::deadline_exceeded(format!("no answer within {} ms", deadline.as_millis())).into_http(),
            };
            let code = Status::from_header_map(response.headers()).map_or(Code::Ok, |s| s.code());
            let took = in_flight.answered(code_name(code));
            tracing::debug!(%path, code = code_name(code), took_us = took.as_micros() as u64, "call");
            Ok(response)
        })
    }
}

/// The grpc-timeout header: up to 8 digits and a unit.
fn client_deadline(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = if digits.len() <= 8 { digits.parse().ok()? } else { return None };
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// As gRPC's documents write it.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_that_is_not_answered_in_time_is_deadline_exceeded_and_counted() {
        let mut registry = prometheus_client::registry::Registry::default();
        let metrics = RequestMetrics::register(&mut registry);
        let calls = Calls { metrics, longest: Duration::from_secs(3600) };
        let never = tower::service_fn(|_: Request<Body>| std::future::pending::<Result<_, std::convert::Infallible>>());
        let call = Request::builder().uri("/nestd.v1.VmService/Get").header("grpc-timeout", "10m");
        let response = calls.layer(never).call(call.body(Body::empty()).unwrap()).await.unwrap();
        let status = Status::from_header_map(response.headers()).unwrap();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        assert!(text.contains("method=\"Get\",code=\"DEADLINE_EXCEEDED\"} 1"), "{text}");
        assert!(text.contains("nestd_requests_in_flight 0"), "{text}");
    }

    #[test]
    fn the_client_deadline_header_is_read_in_every_unit() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            client_deadline(&headers)
        };
        assert_eq!(read("2S"), Some(Duration::from_secs(2)));
        assert_eq!(read("50m"), Some(Duration::from_millis(50)));
        assert_eq!(read("1H"), Some(Duration::from_secs(3600)));
        assert_eq!(read("7n"), Some(Duration::from_nanos(7)));
        for wrong in ["", "S", "5", "123456789S", "1x"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}

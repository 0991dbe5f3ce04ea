//! `/metrics`, in OpenMetrics text.

mod requests;
mod vms;

use std::{future::Future, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::net::TcpListener;

pub use requests::RequestMetrics;
pub use vms::VmCollector;

pub async fn serve(listener: TcpListener, registry: Arc<Registry>, end: impl Future<Output = ()> + Send + 'static) {
    let router = Router::new().route("/metrics", get(scrape)).with_state(registry);
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(end).await {
        tracing::error!(%error, "metrics are no longer served");
    }
}

async fn scrape(State(registry): State<Arc<Registry>>) -> Response {
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => {
            ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

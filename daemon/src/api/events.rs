//! EventService.

use nestd_proto::v1::{self, event_service_server::EventService, stream_events_response::Item};
use nestd_vcpu::event::frequent_kinds;
use nested_vmx::event::EventKind;
use tonic::{Request, Response, Status};

use super::{
    Api, convert,
    stream::{BoxStream, feed, follow},
};
use crate::error::Error;

/// Events read from the log at once.
const BATCH: usize = 256;

/// Which events a client wants.
struct Filter {
    kinds: Vec<v1::EventKind>,
    vcpus: Vec<u32>,
}

impl Filter {
    fn new(filter: v1::EventFilter, cpus: u32) -> Result<Self, Error> {
        let kinds = filter.kinds.iter().map(|&kind| match v1::EventKind::try_from(kind) {
            Ok(v1::EventKind::Unspecified) | Err(_) => {
                Err(Error::field("filter.kinds", format!("{kind} is not a kind of event")))
            }
            Ok(kind) => Ok(kind),
        });
        if let Some(vcpu) = filter.vcpus.iter().find(|&&vcpu| vcpu >= cpus) {
            return Err(Error::field("filter.vcpus", format!("there is no vCPU {vcpu}: the VM has {cpus}")));
        }
        Ok(Self { kinds: kinds.collect::<Result<_, Error>>()?, vcpus: filter.vcpus })
    }

    fn wants(&self, event: &v1::Event) -> bool {
        (self.kinds.is_empty() || self.kinds.contains(&event.kind()))
            && (self.vcpus.is_empty() || event.vcpu.is_some_and(|vcpu| self.vcpus.contains(&vcpu)))
    }

    /// The frequent kinds that it names: they are recorded only on demand.
    fn frequent(&self) -> Vec<EventKind> {
        let named = |kind: &EventKind| self.kinds.contains(&convert::event_kind(*kind));
        frequent_kinds().into_iter().filter(named).collect()
    }
}

#[tonic::async_trait]
impl EventService for Api {
    type StreamStream = BoxStream<v1::StreamEventsResponse>;

    async fn stream(&self, request: Request<v1::StreamEventsRequest>) -> Result<Response<Self::StreamStream>, Status> {
        let v1::StreamEventsRequest { vm, since_sequence, filter, follow: stay } = request.into_inner();
        let hosted = self.registry.get(&vm)?;
        let filter = Filter::new(filter.unwrap_or_default(), hosted.vm.spec().cpus)?;
        let closed = self.closed.clone();
        // Before the answer: what happens after it is recorded.
        let subscription = hosted.vm.events().subscribe(filter.frequent());
        Ok(feed(move |feed| async move {
            let _subscription = subscription;
            let mut next = since_sequence.saturating_add(1);
            let (feed, hosted, filter) = (&feed, &hosted, &filter);
            follow(feed, hosted, closed, stay, || {
                let batch = hosted.vm.events().read(next, BATCH);
                let found = batch.next_seq > next;
                next = next.max(batch.next_seq);
                async move {
                    if let Some(gap) = batch.gap {
                        let next_sequence = batch.events.first().map_or(batch.next_seq, |e| e.seq);
                        let gap = v1::Gap { lost: gap.lost, next_sequence, signals_lost: gap.signals };
                        feed.send(v1::StreamEventsResponse { item: Some(Item::Gap(gap)) }).await?;
                    }
                    let events = batch.events.iter().map(|e| convert::event(hosted.name(), e));
                    for event in events.filter(|e| filter.wants(e)) {
                        feed.send(v1::StreamEventsResponse { item: Some(Item::Event(event)) }).await?;
                    }
                    Ok(found)
                }
            })
            .await
        }))
    }
}

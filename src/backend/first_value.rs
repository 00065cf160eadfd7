//! Lists that are unknown until DNS has answered or failed for the first time.

use tokio::sync::watch;

/// The list, as soon as it is known.
pub(super) async fn first_value<T: Clone>(list: &watch::Sender<Option<Vec<T>>>) -> Vec<T> {
    let known = list.subscribe().wait_for(Option::is_some).await.map(|known| known.clone());
    // The caller holds the sender, so the channel is open, and the value that was waited for is there.
    known.ok().flatten().unwrap_or_default()
}

/// Makes an unknown list an empty one.
pub(super) fn set_empty_if_unset<T>(list: &watch::Sender<Option<Vec<T>>>) {
    list.send_if_modified(|known| known.is_none().then(|| *known = Some(Vec::new())).is_some());
}

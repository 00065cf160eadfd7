//! Transcripts of both dialogues, run at every split of the input: however the bytes arrive, the same is said.

mod answers;
mod client;
mod server;

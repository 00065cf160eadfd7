//! What a client makes the dialogue remember, in bytes.

use super::{Prelogin, SaslExchange, State};

impl Prelogin {
    /// Memory that the client's words take now.
    pub fn memory(&self) -> usize {
        self.framer.capacity() + self.retained()
    }

    /// Memory that they take once `more` bytes have arrived.
    pub fn memory_with(&self, more: usize) -> usize {
        self.framer.capacity_with(more) + self.retained()
    }

    /// What is kept of earlier commands.
    fn retained(&self) -> usize {
        let exchange = match &self.state {
            State::Sasl(_, SaslExchange::LoginPassword(user)) => user.len(),
            State::Sasl(..) | State::Command | State::Relayed(_) => 0,
        };
        exchange + self.client_id().size()
    }
}

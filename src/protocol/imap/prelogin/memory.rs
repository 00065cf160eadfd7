//! The memory that the dialogue holds for a client, in bytes.

use super::{Prelogin, SaslExchange, State};

impl Prelogin {
    /// Memory that the client's input takes now.
    pub fn memory(&self) -> usize {
        self.framer.capacity() + self.retained()
    }

    /// Memory that the client's input will take once `more` bytes have arrived.
    pub fn memory_with(&self, more: usize) -> usize {
        self.framer.capacity_with(more) + self.retained()
    }

    /// Memory retained from earlier commands.
    fn retained(&self) -> usize {
        let exchange = match &self.state {
            State::Sasl(_, SaslExchange::LoginPassword(user)) => user.len(),
            State::Sasl(..) | State::Command => 0,
        };
        exchange + self.client_id().size()
    }
}

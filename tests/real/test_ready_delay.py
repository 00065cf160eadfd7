"""limits.ready_delay: after SIGTERM the readiness check fails before the port closes."""

import signal
import unittest
import urllib.error
import urllib.request

from fixtures import TIMEOUT, answers, wait_for
from handover_fixtures import HandoverTestCase, wait_for_exit
from imap_client import RawClient


class ReadyDelay(HandoverTestCase):
    def ready_status(self):
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/ready", timeout=TIMEOUT).status
        except urllib.error.HTTPError as error:
            return error.code

    def test_ready_delay_keeps_the_port_open_after_readiness_fails(self):
        for second_signal in (False, True):
            with self.subTest(second_signal=second_signal):
                self.write(limits=f"ready_delay: {'1h' if second_signal else '2s'}")
                process = self.start()
                self.assertEqual(self.ready_status(), 200)
                process.child.send_signal(signal.SIGTERM)
                wait_for("the check to fail", lambda: self.ready_status() == 503)
                # Connections are still served, and no handover begins.
                self.assertTrue(answers(self.port, b"* OK"))
                self.assertIn("this process is stopping", self.upgrade(1))
                client = RawClient(self.port)
                self.assertTrue(client.line().startswith(b"* OK"))
                if second_signal:
                    process.child.send_signal(signal.SIGTERM)
                self.assertTrue(client.line().startswith(b"* BYE [UNAVAILABLE]"), "the drain has begun")
                self.assertEqual(wait_for_exit(process), 0)
                self.assertFalse(answers(self.port))

    def test_ready_delay_is_off_by_default(self):
        process = self.start()
        process.child.send_signal(signal.SIGTERM)
        self.assertEqual(wait_for_exit(process), 0)
        self.assertNotIn("ready_delay", process.text())


if __name__ == "__main__":
    unittest.main()

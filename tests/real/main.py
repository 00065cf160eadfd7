"""Runs the tests with real servers and clients; `-k WORD` selects tests by name.

The last line is `real: N passed, N failed`. Running no test is a failure unless `-k` is given.
"""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.dont_write_bytecode = True


def main():
    loader = unittest.TestLoader()
    words = [word for flag, word in zip(sys.argv[1::2], sys.argv[2::2]) if flag == "-k"]
    if words:
        loader.testNamePatterns = [f"*{word}*" for word in words]
    suite = loader.discover(str(Path(__file__).parent), pattern="test_*.py")
    result = unittest.TextTestRunner(verbosity=2).run(suite)
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    passed = max(0, result.testsRun - failed - len(result.skipped))
    print(f"real: {passed} passed, {failed + len(result.skipped)} failed")
    return 0 if failed == 0 and not result.skipped and (passed or words) else 1


if __name__ == "__main__":
    sys.exit(main())

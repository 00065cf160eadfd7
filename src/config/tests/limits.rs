//! Limits.

use super::*;

#[test]
fn ready_delay_may_be_zero() {
    let delay = |text: &str| parse(Path::new("v.yaml"), &format!("{MINIMAL}{text}")).unwrap().limits.ready_delay;
    assert_eq!((delay(""), delay("limits: {ready_delay: 0s}\n")), (Duration::ZERO, Duration::ZERO));
    assert_eq!(delay("limits: {ready_delay: 10s}\n"), Duration::from_secs(10));
    assert_eq!(
        with("limits: {ready_delay: 2h}\n"),
        ["v.yaml:4:10: limits.ready_delay: expected a duration from 0s to 1h"]
    );
}

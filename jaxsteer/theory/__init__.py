"""Weight updates as activation shifts: pure functions that measure, replay and convert them."""

pub(super) fn kill_point() {}

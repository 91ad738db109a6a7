# ---- what the run says of itself: "STATE STEP" in $run/status, the newest checkpoint's name in $run/latest
read_state() {
  state=''
  read -r state _ 2>/dev/null <"$run/status" || true
}
read_latest() {
  latest=''
  read -r latest 2>/dev/null <"$run/latest" || true
}
read_latest
before=$latest

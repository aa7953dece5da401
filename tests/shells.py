"What a shell does to the programs that it starts."
import signal


def listen():
    "Hear Ctrl-C, which a shell tells its background jobs to ignore, and these tests may be one: a `preexec_fn`."
    signal.signal(signal.SIGINT, signal.default_int_handler)

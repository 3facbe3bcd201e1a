"""What the interpreter inside the sandbox runs (`python -c`), and in it the model-written code. Nothing imports it.

It holds the ticket while the code runs, but not the secret: that comes in exchange for the ticket once the tests have
ended, and nothing runs after it is printed.
"""

import os
import sys
import types


def run(channel, write, leave):
    os.set_inheritable(channel, False)
    os.environ.clear()
    sys.argv[:] = sys.orig_argv[:] = [""]
    receive = open(channel, "rb", closefd=False).read  # noqa: SIM115
    ticket = receive(16)
    program = receive(int.from_bytes(receive(8), "big"))
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(program, "program.py", "exec"), main.__dict__)
    write(channel, ticket)
    write(1, receive(32))
    leave(0)


run(int(sys.argv[1]), os.write, os._exit)

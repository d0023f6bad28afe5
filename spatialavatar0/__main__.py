"`python -m spatialavatar0` is the command line; so `accelerate launch -m spatialavatar0` is, too."

from spatialavatar0.cli import main

if __name__ == '__main__':
    raise SystemExit(main())

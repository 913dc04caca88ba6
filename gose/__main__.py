from gose.cli import main

main()

// Command gopeers is a machine, a server or one call, with grpc-go and wireguard-go as existing machines and servers use them.
// Messages are written and read by hand, so it needs no generated code. It prints a line of JSON for each thing that happens.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: gopeers call|machine|server …")
		os.Exit(2)
	}
	arguments := os.Args[2:]
	var err error
	switch os.Args[1] {
	case "call":
		err = call(arguments)
	case "machine":
		err = runMachine(ctx, arguments)
	case "server":
		err = runServer(ctx, arguments)
	default:
		err = fmt.Errorf("unknown: %s", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

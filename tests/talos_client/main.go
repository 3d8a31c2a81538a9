// The machines' real client package against a machine's API: what the command-line client does, and a server to do it to.
//
//	talosclient maintenance ADDRESS DOCUMENTS      calls of `--insecure`: version, disks, resources, apply-config --mode try
//	talosclient secured ADDRESS CA CERTIFICATE KEY calls by a talosconfig with a client certificate
//	talosclient serve ADDRESS CA CERTIFICATE KEY   a machine API that asks for a client certificate
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/cosi-project/runtime/pkg/safe"
	"github.com/siderolabs/talos/pkg/machinery/api/common"
	"github.com/siderolabs/talos/pkg/machinery/api/machine"
	"github.com/siderolabs/talos/pkg/machinery/client"
	clientconfig "github.com/siderolabs/talos/pkg/machinery/client/config"
	"github.com/siderolabs/talos/pkg/machinery/resources/network"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
)

func must[T any](value T, err error) T {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return value
}

func read(path string) string { return string(must(os.ReadFile(path))) }

func maintenance(ctx context.Context, address, documents string) {
	insecure := client.WithTLSConfig(&tls.Config{InsecureSkipVerify: true})
	c := must(client.New(ctx, client.WithEndpoints(address), insecure))
	defer c.Close()
	version := must(c.Version(ctx))
	fmt.Println("version", version.GetMessages()[0].GetVersion().GetTag())
	disks := must(c.Disks(ctx))
	fmt.Println("disks answered", len(disks.GetMessages()))
	links := must(safe.StateListAll[*network.LinkStatus](ctx, c.COSI))
	for link := range links.All() {
		fmt.Println("link", link.Metadata().ID())
	}
	applied := must(c.ApplyConfiguration(ctx, &machine.ApplyConfigurationRequest{
		Data:           []byte(read(documents)),
		Mode:           machine.ApplyConfigurationRequest_TRY,
		TryModeTimeout: durationpb.New(2 * time.Second),
	}))
	fmt.Println("applied", strings.ReplaceAll(applied.GetMessages()[0].GetModeDetails(), "\n", " "))
}

func secured(ctx context.Context, address, ca, certificate, key string) {
	encode := func(path string) string { return base64.StdEncoding.EncodeToString([]byte(read(path))) }
	config := &clientconfig.Config{Context: "here", Contexts: map[string]*clientconfig.Context{"here": {
		Endpoints: []string{address}, CA: encode(ca), Crt: encode(certificate), Key: encode(key),
	}}}
	c := must(client.New(ctx, client.WithConfig(config)))
	defer c.Close()
	version := must(c.Version(ctx))
	fmt.Println("version", version.GetMessages()[0].GetVersion().GetTag())
	stream := must(c.Read(ctx, "/large"))
	fmt.Println("read", must(io.Copy(io.Discard, stream)))
}

// A machine that tells its callers who they are, and has one large file.
type server struct {
	machine.UnimplementedMachineServiceServer
}

func (server) Version(ctx context.Context, _ *emptypb.Empty) (*machine.VersionResponse, error) {
	from, _ := peer.FromContext(ctx)
	who := from.AuthInfo.(credentials.TLSInfo).State.VerifiedChains[0][0].Subject.CommonName
	tag := &machine.VersionInfo{Tag: "for " + who}
	return &machine.VersionResponse{Messages: []*machine.Version{{Version: tag}}}, nil
}

func (server) Read(_ *machine.ReadRequest, stream machine.MachineService_ReadServer) error {
	for range 256 {
		if err := stream.Send(&common.Data{Bytes: make([]byte, 32768)}); err != nil {
			return err
		}
	}
	return nil
}

func (server) Dmesg(_ *machine.DmesgRequest, stream machine.MachineService_DmesgServer) error {
	return stream.Send(&common.Data{Bytes: []byte("kern: info: [2026-01-01T00:00:00Z]: eth0: link up\n")})
}

func (server) Logs(request *machine.LogsRequest, stream machine.MachineService_LogsServer) error {
	return stream.Send(&common.Data{Bytes: []byte("a line of " + request.GetId() + "\n")})
}

func serve(address, ca, certificate, key string) {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(read(ca)))
	config := &tls.Config{
		Certificates: []tls.Certificate{must(tls.LoadX509KeyPair(certificate, key))},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    roots,
	}
	listener := must(net.Listen("tcp", address))
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)))
	machine.RegisterMachineServiceServer(s, server{})
	fmt.Println("serving")
	must(0, s.Serve(listener))
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	switch arguments := os.Args[2:]; os.Args[1] {
	case "maintenance":
		maintenance(ctx, arguments[0], arguments[1])
	case "secured":
		secured(ctx, arguments[0], arguments[1], arguments[2], arguments[3])
	case "serve":
		serve(arguments[0], arguments[1], arguments[2], arguments[3])
	}
}

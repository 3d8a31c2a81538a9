package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	provisionMethod = "/sidero.link.ProvisionService/Provision"
	streamMethod    = "/sidero.link.WireGuardOverGRPCService/CreateStream"
	addressKey      = "x-siderolink-ipv6-addr"
)

// A message is passed as it is on the wire.
type message struct{ data []byte }

type codec struct{}

func (codec) Name() string                  { return "proto" }
func (codec) Marshal(v any) ([]byte, error) { return v.(*message).data, nil }
func (codec) Unmarshal(data []byte, v any) error {
	v.(*message).data = append([]byte(nil), data...)
	return nil
}

// One server's API, and how it is called.
type target struct {
	api, root, authority, agent string
}

func (t *target) flags(set *flag.FlagSet) {
	set.StringVar(&t.api, "api", "127.0.0.1:8090", "the server's `host:port`")
	set.StringVar(&t.root, "ca", "", "trust this `file` (PEM), and use TLS")
	set.StringVar(&t.authority, "authority", "", "authority to send")
	set.StringVar(&t.agent, "user-agent", "", "user agent to send")
}

func (t *target) dial() (*grpc.ClientConn, error) {
	secure := insecure.NewCredentials()
	if t.root != "" {
		pem, err := os.ReadFile(t.root)
		if err != nil {
			return nil, err
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(pem)
		secure = credentials.NewTLS(&tls.Config{RootCAs: roots})
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(secure),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(codec{})),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, PermitWithoutStream: true}),
	}
	if t.authority != "" {
		options = append(options, grpc.WithAuthority(t.authority))
	}
	if t.agent != "" {
		options = append(options, grpc.WithUserAgent(t.agent))
	}
	return grpc.NewClient(t.api, options...)
}

// say prints one line of JSON.
func say(what string, fields map[string]any) {
	fields["event"] = what
	line, _ := json.Marshal(fields)
	fmt.Println(string(line))
}

func failed(err error) map[string]any {
	found := status.Convert(err)
	return map[string]any{"code": found.Code().String(), "message": found.Message(), "details": len(found.Details())}
}

func text(data []byte, number protowire.Number, value string) []byte {
	return protowire.AppendString(protowire.AppendTag(data, number, protowire.BytesType), value)
}

// fieldsOf gives the length-delimited fields of a message.
func fieldsOf(data []byte) map[protowire.Number][]string {
	found := map[protowire.Number][]string{}
	for len(data) > 0 {
		number, kind, size := protowire.ConsumeTag(data)
		if size < 0 {
			return found
		}
		data = data[size:]
		length := protowire.ConsumeFieldValue(number, kind, data)
		if length < 0 {
			return found
		}
		if kind == protowire.BytesType {
			value, _ := protowire.ConsumeBytes(data)
			found[number] = append(found[number], string(value))
		}
		data = data[length:]
	}
	return found
}

type pairs []string

func (p *pairs) String() string         { return strings.Join(*p, " ") }
func (p *pairs) Set(value string) error { *p = append(*p, value); return nil }

// call makes one unary call with a message in base64, and prints everything about its answer.
func call(arguments []string) error {
	var to target
	var fields pairs
	set := flag.NewFlagSet("call", flag.ExitOnError)
	to.flags(set)
	method := set.String("method", provisionMethod, "the method's path")
	given := set.String("message", "", "the message in base64")
	compressed := set.Bool("gzip", false, "compress the message")
	timeout := set.Duration("timeout", 20*time.Second, "the call's timeout")
	count := set.Int("count", 1, "calls in turn on one connection")
	set.Var(&fields, "metadata", "`key=value`; repeatable")
	_ = set.Parse(arguments)
	data, err := base64.StdEncoding.DecodeString(*given)
	if err != nil {
		return err
	}
	connection, err := to.dial()
	if err != nil {
		return err
	}
	defer connection.Close()
	for range *count {
		ctx, cancel := context.WithTimeout(context.Background(), *timeout)
		for _, field := range fields {
			key, value, _ := strings.Cut(field, "=")
			ctx = metadata.AppendToOutgoingContext(ctx, key, value)
		}
		var header, trailer metadata.MD
		options := []grpc.CallOption{grpc.Header(&header), grpc.Trailer(&trailer)}
		if *compressed {
			options = append(options, grpc.UseCompressor(gzip.Name))
		}
		answer := &message{}
		err = connection.Invoke(ctx, *method, &message{data}, answer, options...)
		cancel()
		found := failed(err)
		found["header"], found["trailer"] = header, trailer
		if status.Code(err) == codes.OK {
			found["fields"] = fieldsOf(answer.data)
		}
		say("answer", found)
	}
	return nil
}

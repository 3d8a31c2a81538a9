package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	overlayPrefix = "fdae:41e4:649b:9303::"
	virtualPrefix = "fdae:41e4:649b:9304::"
)

var (
	errReplaced   = status.Error(codes.Aborted, "peer replaced")
	errNotAllowed = status.Error(codes.PermissionDenied, "peer not allowed")
)

// A server that knows each machine by its key.
type server struct {
	overlay   *overlay
	key       string
	token     string
	endpoints []string
	tunnel    bool
	bind      *streamBind

	lock    sync.Mutex
	numbers map[string]uint16
	allowed map[netip.Addr]bool
	streams map[string]*peerStream
}

// One machine's stream, and what waits for it.
type peerStream struct {
	toMachine chan []byte
	replaced  chan struct{}
}

func address(prefix string, number uint16) netip.Addr {
	data := netip.MustParseAddr(prefix + "1").As16()
	binary.BigEndian.PutUint16(data[14:], number)
	return netip.AddrFrom16(data)
}

func runServer(ctx context.Context, arguments []string) error {
	s := &server{numbers: map[string]uint16{}, allowed: map[netip.Addr]bool{}, streams: map[string]*peerStream{}}
	set := flag.NewFlagSet("server", flag.ExitOnError)
	listen := set.String("listen", "127.0.0.1:8090", "`host:port` of the API")
	endpoints := set.String("endpoints", "", "WireGuard endpoints, separated by commas; none for the tunnel only")
	name := set.String("interface", "siderolink", "interface")
	port := set.Int("port", 50180, "WireGuard's port")
	certificate := set.String("certificate", "", "`file` with certificate and key (PEM)")
	set.StringVar(&s.token, "token", "", "join token")
	maxAge := set.Duration("max-age", 0, "age at which a connection is ended")
	grace := set.Duration("grace", time.Second, "time for its calls to end then")
	_ = set.Parse(arguments)
	key := newKey()
	s.key, s.tunnel = publicText(key), *endpoints == ""
	var bind conn.Bind = conn.NewDefaultBind()
	if s.tunnel {
		s.bind = newStreamBind(s.send)
		bind = s.bind
	} else {
		s.endpoints = strings.Split(*endpoints, ",")
	}
	var err error
	if s.overlay, err = openOverlay(*name, bind, key, *port); err != nil {
		return err
	}
	if err := s.overlay.address(overlayPrefix + "1/64"); err != nil {
		return err
	}
	options := []grpc.ServerOption{
		grpc.ForceServerCodec(codec{}),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: *maxAge, MaxConnectionAgeGrace: *grace}),
	}
	if *certificate != "" {
		pair, err := tls.LoadX509KeyPair(*certificate, *certificate)
		if err != nil {
			return err
		}
		options = append(options, grpc.Creds(credentials.NewServerTLSFromCert(&pair)))
	}
	api := grpc.NewServer(options...)
	s.register(api)
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	go func() {
		<-ctx.Done()
		api.Stop()
	}()
	say("serving", map[string]any{"key": s.key})
	return api.Serve(listener)
}

func (s *server) register(api *grpc.Server) {
	provision := func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		request := &message{}
		if err := decode(request); err != nil {
			return nil, err
		}
		return s.provision(ctx, fieldsOf(request.data))
	}
	api.RegisterService(&grpc.ServiceDesc{
		ServiceName: "sidero.link.ProvisionService",
		HandlerType: (*any)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "Provision", Handler: provision}},
	}, s)
	api.RegisterService(&grpc.ServiceDesc{
		ServiceName: "sidero.link.WireGuardOverGRPCService",
		HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{
			StreamName:    "CreateStream",
			Handler:       func(_ any, stream grpc.ServerStream) error { return s.stream(stream) },
			ServerStreams: true,
			ClientStreams: true,
		}},
	}, s)
}

func (s *server) provision(ctx context.Context, request fields) (*message, error) {
	given, _ := metadata.FromIncomingContext(ctx)
	say("provision", map[string]any{"fields": request, "metadata": given})
	if s.token != "" && (len(request[3]) == 0 || request[3][0] != s.token) {
		return nil, status.Error(codes.PermissionDenied, "unauthorized")
	}
	key := request[2][0]
	number := s.number(key)
	there, at := address(overlayPrefix, number), ""
	endpoints := append([]string(nil), s.endpoints...)
	if s.tunnel {
		at = netip.AddrPortFrom(address(virtualPrefix, number), 50889).String()
		endpoints = []string{at}
	}
	if err := s.overlay.peer(key, there.String()+"/128", at, keepaliveSeconds); err != nil {
		return nil, err
	}
	if last := len(endpoints) - 1; last > 0 {
		endpoints[0], endpoints[last] = endpoints[last], endpoints[0]
	}
	var answer []byte
	for _, one := range endpoints {
		answer = text(answer, 1, one)
	}
	answer = text(answer, 3, s.key)
	answer = text(answer, 4, there.String()+"/64")
	answer = text(answer, 5, overlayPrefix+"1")
	if at != "" {
		answer = text(answer, 6, at)
	}
	return &message{answer}, nil
}

// number is the machine's in both prefixes; its streams are allowed from now on.
func (s *server) number(key string) uint16 {
	s.lock.Lock()
	defer s.lock.Unlock()
	if s.numbers[key] == 0 {
		s.numbers[key] = uint16(len(s.numbers) + 2)
		s.allowed[address(virtualPrefix, s.numbers[key])] = true
	}
	return s.numbers[key]
}

func (s *server) stream(stream grpc.ServerStream) error {
	given, _ := metadata.FromIncomingContext(stream.Context())
	values := given.Get(addressKey)
	if len(values) == 0 {
		return fmt.Errorf("no %s", addressKey)
	}
	from, err := netip.ParseAddrPort(values[0])
	if err != nil {
		return err
	}
	own := &peerStream{make(chan []byte, queueSize), make(chan struct{})}
	s.lock.Lock()
	allowed, before := s.allowed[from.Addr()], s.streams[from.String()]
	if allowed {
		s.streams[from.String()] = own
	}
	s.lock.Unlock()
	if !allowed {
		return errNotAllowed
	}
	if before != nil {
		close(before.replaced)
	}
	say("stream", map[string]any{"address": from.String(), "metadata": given})
	ended := make(chan error, 1)
	go func() { ended <- s.receive(stream, from) }()
	for {
		select {
		case <-own.replaced:
			return errReplaced
		case err := <-ended:
			s.forget(from.String(), own)
			say("stream ended", failed(err))
			return err
		case data := <-own.toMachine:
			if err := stream.SendMsg(&message{packet(data)}); err != nil {
				return err
			}
		}
	}
}

func (s *server) forget(at string, own *peerStream) {
	s.lock.Lock()
	defer s.lock.Unlock()
	if s.streams[at] == own {
		delete(s.streams, at)
	}
}

func (s *server) receive(stream grpc.ServerStream, from netip.AddrPort) error {
	for {
		found := &message{}
		if err := stream.RecvMsg(found); err != nil {
			return err
		}
		for _, data := range fieldsOf(found.data)[2] {
			s.bind.received <- datagram{[]byte(data), from}
		}
	}
}

// send keeps the newest datagrams; without a stream they are lost.
func (s *server) send(data []byte, to netip.AddrPort) {
	s.lock.Lock()
	own := s.streams[to.String()]
	s.lock.Unlock()
	if own == nil {
		return
	}
	for {
		select {
		case own.toMachine <- data:
			return
		default:
		}
		select {
		case <-own.toMachine:
		default:
		}
	}
}

package main

import (
	"context"
	"crypto/ecdh"
	"errors"
	"flag"
	"io"
	"net/netip"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
)

// What a machine says about itself.
type machine struct {
	to                         target
	uuid, token, unique, tag   string
	tunnel, twice              bool
	name                       string
	look, down, retry, timeout time.Duration

	key       *ecdh.PrivateKey
	overlay   *overlay
	bind      *streamBind
	toServer  chan []byte
	serverKey string
	virtual   string
	stopRelay context.CancelFunc
	relayed   sync.WaitGroup
}

// request has the fields in the order and with the presence of existing machines.
func (m *machine) request() []byte {
	data := text(nil, 1, m.uuid)
	data = text(data, 2, publicText(m.key))
	if m.token != "" {
		data = text(data, 3, m.token)
	}
	data = text(data, 4, m.unique)
	data = text(data, 5, m.tag)
	if m.tunnel {
		data = protowire.AppendVarint(protowire.AppendTag(data, 6, protowire.VarintType), 1)
	}
	return data
}

type fields = map[protowire.Number][]string

// provision calls once, over a connection of its own.
func (m *machine) provision(ctx context.Context) (fields, error) {
	connection, err := m.to.dial()
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(ctx, m.timeout)
	defer cancel()
	answer := &message{}
	if err := connection.Invoke(ctx, provisionMethod, &message{m.request()}, answer); err != nil {
		say("refused", failed(err))
		return nil, err
	}
	found := fieldsOf(answer.data)
	say("provisioned", map[string]any{"fields": found})
	return found, nil
}

// first provisions, twice at about the same time if so wanted, as at the start of existing machines.
func (m *machine) first(ctx context.Context) (fields, error) {
	if m.twice {
		m.relayed.Add(1)
		go func() {
			defer m.relayed.Done()
			_, _ = m.provision(ctx)
		}()
		time.Sleep(5 * time.Millisecond)
	}
	return m.provision(ctx)
}

func runMachine(ctx context.Context, arguments []string) error {
	m := &machine{key: newKey(), toServer: make(chan []byte, queueSize)}
	set := flag.NewFlagSet("machine", flag.ExitOnError)
	m.to.flags(set)
	set.StringVar(&m.uuid, "uuid", "", "UUID")
	set.StringVar(&m.token, "token", "", "join token")
	set.StringVar(&m.unique, "unique", "", "unique token")
	set.StringVar(&m.tag, "version", "v1.13.0", "Talos version")
	set.StringVar(&m.name, "interface", "siderolink", "interface")
	set.BoolVar(&m.tunnel, "tunnel", false, "ask for the tunnel")
	set.BoolVar(&m.twice, "twice", false, "provision twice at the start")
	set.DurationVar(&m.look, "look", 30*time.Second, "time between looks at the last handshake")
	set.DurationVar(&m.down, "down", 275*time.Second, "age of a handshake that makes the link dead")
	set.DurationVar(&m.retry, "retry", 10*time.Second, "time from the end of a stream to the next one")
	set.DurationVar(&m.timeout, "timeout", 30*time.Second, "timeout of a Provision call")
	_ = set.Parse(arguments)
	answer, err := m.first(ctx)
	for ctx.Err() == nil {
		if err == nil {
			err = m.use(ctx, answer)
		}
		if err != nil {
			say("failed", map[string]any{"message": err.Error()})
			pause(ctx, time.Second)
		}
		answer, err = m.provision(ctx)
	}
	return nil
}

func pause(ctx context.Context, long time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(long):
	}
}

// use configures the link, and returns once it is dead on each endpoint.
func (m *machine) use(ctx context.Context, answer fields) error {
	endpoints := append([]string(nil), answer[1]...)
	if last := len(endpoints) - 1; last > 0 {
		endpoints[0], endpoints[last] = endpoints[last], endpoints[0]
	}
	virtual := ""
	if len(answer[6]) > 0 {
		virtual = answer[6][0]
	}
	if m.overlay == nil {
		var bind conn.Bind = conn.NewDefaultBind()
		if virtual != "" {
			m.bind = newStreamBind(m.queue)
			bind = m.bind
		}
		var err error
		if m.overlay, err = openOverlay(m.name, bind, m.key, 0); err != nil {
			return err
		}
	}
	if err := m.overlay.address(answer[4][0]); err != nil {
		return err
	}
	if virtual != "" {
		m.relay(ctx, virtual)
	}
	if m.serverKey != "" && m.serverKey != answer[3][0] {
		_ = m.overlay.forget(m.serverKey)
	}
	m.serverKey = answer[3][0]
	for _, at := range endpoints {
		if err := m.overlay.peer(m.serverKey, answer[5][0]+"/128", at, keepaliveSeconds); err != nil {
			return err
		}
		say("up", map[string]any{"endpoint": at})
		m.untilDead(ctx)
	}
	return nil
}

func (m *machine) untilDead(ctx context.Context) {
	for ctx.Err() == nil {
		pause(ctx, m.look)
		if age, ever := m.overlay.lastHandshake(); !ever || age >= m.down {
			return
		}
	}
}

// queue keeps the newest datagrams to the server.
func (m *machine) queue(data []byte, _ netip.AddrPort) {
	for {
		select {
		case m.toServer <- data:
			return
		default:
		}
		select {
		case <-m.toServer:
		default:
		}
	}
}

// relay carries datagrams in streams for this virtual address from now on. Only another address ends the present stream.
func (m *machine) relay(ctx context.Context, virtual string) {
	if m.virtual == virtual {
		return
	}
	m.virtual = virtual
	if m.stopRelay != nil {
		m.stopRelay()
		m.relayed.Wait()
	}
	ctx, m.stopRelay = context.WithCancel(ctx)
	m.relayed.Add(1)
	go func() {
		defer m.relayed.Done()
		for ctx.Err() == nil {
			err := m.stream(ctx, virtual)
			if ctx.Err() == nil {
				say("stream ended", failed(err))
				pause(ctx, m.retry)
			}
		}
	}()
}

// stream opens one to send a datagram, which is lost, and carries those after it until the stream ends.
func (m *machine) stream(ctx context.Context, virtual string) error {
	connection, err := m.to.dial()
	if err != nil {
		return err
	}
	defer connection.Close()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-m.toServer:
	}
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, addressKey, virtual))
	defer cancel()
	description := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	stream, err := connection.NewStream(ctx, description, streamMethod)
	if err != nil {
		return err
	}
	say("stream opened", map[string]any{"address": virtual})
	ended, sent := make(chan error, 1), make(chan struct{})
	from, _ := netip.ParseAddrPort(virtual)
	go func() { ended <- m.receive(ctx, stream, from, sent) }()
	for has := false; ; {
		select {
		case err := <-ended:
			return err
		case data := <-m.toServer:
			err := stream.SendMsg(&message{packet(data)})
			if !has {
				close(sent)
				has = true
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
		}
	}
}

// receive takes nothing before the first datagram was sent.
func (m *machine) receive(ctx context.Context, stream grpc.ClientStream, from netip.AddrPort, sent chan struct{}) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-sent:
	}
	for {
		found := &message{}
		if err := stream.RecvMsg(found); err != nil {
			return err
		}
		for _, data := range fieldsOf(found.data)[2] {
			select {
			case m.bind.received <- datagram{[]byte(data), from}:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
}

func packet(data []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), data)
}

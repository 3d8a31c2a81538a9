package main

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

const (
	mtu              = 1280
	keepaliveSeconds = 25
	queueSize        = 100
	streamPort       = 65530
)

func newKey() *ecdh.PrivateKey {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
}

func publicText(key *ecdh.PrivateKey) string {
	return base64.StdEncoding.EncodeToString(key.PublicKey().Bytes())
}

func hexKey(text string) string {
	raw, _ := base64.StdEncoding.DecodeString(text)
	return hex.EncodeToString(raw)
}

// An address as WireGuard sees it.
type endpoint struct{ netip.AddrPort }

func (e endpoint) ClearSrc()           {}
func (e endpoint) SrcToString() string { return "" }
func (e endpoint) DstToString() string { return e.AddrPort.String() }
func (e endpoint) DstToBytes() []byte  { data, _ := e.AddrPort.MarshalBinary(); return data }
func (e endpoint) DstIP() netip.Addr   { return e.Addr() }
func (e endpoint) SrcIP() netip.Addr   { return netip.Addr{} }

type datagram struct {
	data []byte
	from netip.AddrPort
}

// streamBind is WireGuard's "socket" where datagrams travel in streams.
type streamBind struct {
	received chan datagram
	send     func(data []byte, to netip.AddrPort)

	lock   sync.Mutex
	closed chan struct{}
}

func newStreamBind(send func(data []byte, to netip.AddrPort)) *streamBind {
	return &streamBind{received: make(chan datagram, queueSize), send: send}
}

func (b *streamBind) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	b.lock.Lock()
	defer b.lock.Unlock()
	closed := make(chan struct{})
	b.closed = closed
	receive := func(packets [][]byte, sizes []int, endpoints []conn.Endpoint) (int, error) {
		select {
		case one := <-b.received:
			sizes[0] = copy(packets[0], one.data)
			endpoints[0] = endpoint{one.from}
			return 1, nil
		case <-closed:
			return 0, net.ErrClosed
		}
	}
	return []conn.ReceiveFunc{receive}, streamPort, nil
}

func (b *streamBind) Close() error {
	b.lock.Lock()
	defer b.lock.Unlock()
	if b.closed != nil {
		close(b.closed)
		b.closed = nil
	}
	return nil
}

func (b *streamBind) SetMark(uint32) error { return nil }
func (b *streamBind) BatchSize() int       { return 1 }

func (b *streamBind) Send(packets [][]byte, to conn.Endpoint) error {
	for _, packet := range packets {
		b.send(append([]byte(nil), packet...), to.(endpoint).AddrPort)
	}
	return nil
}

func (b *streamBind) ParseEndpoint(text string) (conn.Endpoint, error) {
	address, err := netip.ParseAddrPort(text)
	return endpoint{address}, err
}

// One WireGuard interface of wireguard-go.
type overlay struct {
	name string
	dev  *device.Device
}

func openOverlay(name string, bind conn.Bind, key *ecdh.PrivateKey, port int) (*overlay, error) {
	there, err := tun.CreateTUN(name, mtu)
	if err != nil {
		return nil, err
	}
	dev := device.NewDevice(there, bind, device.NewLogger(device.LogLevelError, name+": "))
	config := fmt.Sprintf("private_key=%s\nlisten_port=%d\n", hex.EncodeToString(key.Bytes()), port)
	if err := dev.IpcSet(config); err != nil {
		return nil, err
	}
	if err := dev.Up(); err != nil {
		return nil, err
	}
	return &overlay{name, dev}, run("ip", "link", "set", name, "up")
}

func (o *overlay) address(prefix string) error {
	if err := run("ip", "-6", "address", "flush", "dev", o.name, "scope", "global"); err != nil {
		return err
	}
	return run("ip", "-6", "address", "add", prefix, "dev", o.name, "nodad")
}

// peer sets one peer; an empty endpoint leaves it as it is.
func (o *overlay) peer(key, allowed, at string, seconds int) error {
	config := fmt.Sprintf("public_key=%s\nreplace_allowed_ips=true\nallowed_ip=%s\n", hexKey(key), allowed)
	config += fmt.Sprintf("persistent_keepalive_interval=%d\n", seconds)
	if at != "" {
		config += "endpoint=" + at + "\n"
	}
	return o.dev.IpcSet(config)
}

func (o *overlay) forget(key string) error {
	return o.dev.IpcSet(fmt.Sprintf("public_key=%s\nremove=true\n", hexKey(key)))
}

// lastHandshake is the time since the newest handshake of any peer.
func (o *overlay) lastHandshake() (time.Duration, bool) {
	text, _ := o.dev.IpcGet()
	var newest int64
	for line := range strings.SplitSeq(text, "\n") {
		var seconds int64
		if count, _ := fmt.Sscanf(line, "last_handshake_time_sec=%d", &seconds); count == 1 {
			newest = max(newest, seconds)
		}
	}
	return time.Since(time.Unix(newest, 0)), newest > 0
}

func run(program string, arguments ...string) error {
	output, err := exec.Command(program, arguments...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", program, strings.Join(arguments, " "), err, output)
	}
	return nil
}

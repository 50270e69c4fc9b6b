#!/usr/bin/perl
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Datagrams that the kernel cuts out of one large write (UDP_SEGMENT); runs on a lab host and in its guest.
#
#   datagrams.pl answer PORT [gro]     for ever, tells whoever has sent all of them how they came: each for itself, or,
#                                      with `gro`, as many at a time as the kernel has together
#   datagrams.pl send ADDRESS PORT     sends them, prints the answer
use strict;
use warnings;
use Socket qw(:DEFAULT inet_pton unpack_sockaddr_in6 pack_sockaddr_in6);

# From linux/udp.h.
my ($SOL_UDP, $UDP_SEGMENT, $UDP_GRO) = (17, 103, 104);
# 56,000 bytes: less than IP's largest packet, more than any that is not cut.
my ($count, $size) = (40, 1400);
my $pattern = join('', map { chr(($_ * 7) % 251) } 0 .. $count + $size);
# Each has its number, and bytes that no other one has.
my @segments = map { pack('n', $_) . substr($pattern, $_, $size - 2) } 0 .. $count - 1;

sub answer {
    my ($port, $gro) = @_;
    socket(my $socket, AF_INET6, SOCK_DGRAM, 0) or die "socket: $!";
    # SO_RCVBUFFORCE.
    setsockopt($socket, SOL_SOCKET, 33, pack('i', 4 << 20)) or die "receive buffer: $!";
    setsockopt($socket, $SOL_UDP, $UDP_GRO, pack('i', 1)) or die "UDP_GRO: $!" if $gro;
    bind($socket, pack_sockaddr_in6($port, Socket::IN6ADDR_ANY)) or die "bind: $!";
    print "answering\n";
    my ($reads, $wrong, %seen) = (0, 0);
    while (defined(my $from = recv($socket, my $data, 65536, 0))) {
        $reads++;
        for my $segment (unpack("(a$size)*", $data)) {
            my $index = unpack('n', $segment . "\0\0");
            if ($index < $count && $segment eq $segments[$index]) { $seen{$index}++ } else { $wrong++ }
        }
        next if keys %seen < $count && !$wrong;
        my $answer = sprintf("%d right, %d wrong, %d reads", scalar(keys %seen), $wrong, $reads);
        send($socket, $answer, 0, $from) or die "answer: $!";
        ($reads, $wrong, %seen) = (0, 0);
    }
    die "receive: $!";
}

sub deliver {
    my ($address, $port) = @_;
    my $six = $address =~ /:/;
    socket(my $socket, $six ? AF_INET6 : AF_INET, SOCK_DGRAM, 0) or die "socket: $!";
    setsockopt($socket, $SOL_UDP, $UDP_SEGMENT, pack('i', $size)) or die "UDP_SEGMENT: $!";
    my $to = $six ? pack_sockaddr_in6($port, inet_pton(AF_INET6, $address)) : pack_sockaddr_in($port, inet_aton($address));
    connect($socket, $to) or die "connect: $!";
    defined(send($socket, join('', @segments), 0)) or die "send: $!";
    $SIG{ALRM} = sub { die "no answer\n" };
    alarm 60;
    defined(recv($socket, my $answer, 256, 0)) or die "receive: $!";
    print "$answer\n";
}

$| = 1;
my ($role, @arguments) = @ARGV;
my %roles = (answer => \&answer, send => \&deliver);
($roles{$role // ''} or die "usage: datagrams.pl answer PORT [gro] | send ADDRESS PORT\n")->(@arguments);

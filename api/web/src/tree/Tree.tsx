// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The tree at the left: filter box, keyboard, and only the visible rows in the document (a cluster has thousands).
import { ActionIcon, ScrollArea, TextInput } from '@mantine/core';
import { useLocalStorage } from '@mantine/hooks';
import { IconBox, IconChevronDown, IconChevronRight, IconDatabase, IconDeviceDesktop, IconSearch, IconServer, IconServer2, IconX } from '@tabler/icons-react';
import { useNavigate, useRouterState } from '@tanstack/react-router';
import { useVirtualizer } from '@tanstack/react-virtual';
import clsx from 'clsx';
import { useCallback, useMemo, useRef, useState, type KeyboardEvent, type RefObject } from 'react';

import { useResources } from '../api/queries';
import { StatusDot } from '../ui/Status';
import { keyMove, rows, type Row } from './model';

const ROW_PIXELS = 26;
const ICONS = { datacenter: IconServer2, node: IconServer, qemu: IconDeviceDesktop, lxc: IconBox, storage: IconDatabase } as const;
const KIND_NAMES = { datacenter: '', node: 'node', qemu: 'virtual machine', lxc: 'container', storage: 'storage' } as const;

interface RowProps {
  row: Row;
  top: number;
  active: boolean;
  current: boolean;
  onOpen: (row: Row) => void;
  onToggle: (id: string) => void;
}

function TreeRow({ row, top, active, current, onOpen, onToggle }: RowProps) {
  const Icon = ICONS[row.kind];
  const Chevron = row.expanded ? IconChevronDown : IconChevronRight;
  const state = row.status ? `, ${row.lock ? `locked: ${row.lock}` : row.status}` : '';
  return (
    <div
      role="treeitem"
      id={`tree-${row.id}`}
      aria-level={row.level}
      aria-selected={current}
      aria-expanded={row.expanded}
      aria-label={`${row.label}${KIND_NAMES[row.kind] && `, ${KIND_NAMES[row.kind]}`}${state}`}
      className={clsx('atoll-row', active && 'atoll-row-active', current && 'atoll-row-current')}
      style={{ transform: `translateY(${top}px)`, paddingLeft: 6 + (row.level - 1) * 14 }}
      onClick={() => onOpen(row)}
    >
      {row.expanded === undefined ? (
        <span className="atoll-chevron" />
      ) : (
        <span
          className="atoll-chevron"
          onClick={(event) => {
            event.stopPropagation();
            onToggle(row.id);
          }}
        >
          <Chevron size={14} aria-hidden />
        </span>
      )}
      <Icon size={16} stroke={1.7} aria-hidden />
      {row.kind !== 'datacenter' && row.kind !== 'storage' && <StatusDot status={row.status} />}
      <span className="atoll-row-label">{row.label}</span>
      {row.lock && <span className="atoll-row-note">{row.lock}</span>}
    </div>
  );
}

/** The page that is open, as a row's link: tabs and sub-pages belong to their row. */
function useCurrentRow(list: Row[]): string | undefined {
  const pathname = useRouterState({ select: (state) => state.location.pathname });
  return useMemo(() => {
    if (pathname === '/' || pathname.startsWith('/datacenter/')) return 'datacenter';
    const fits = list.filter((row) => row.link !== '/' && (pathname === row.link || pathname.startsWith(`${row.link}/`)));
    return fits.sort((a, b) => b.link.length - a.link.length)[0]?.id;
  }, [list, pathname]);
}

interface TreeProps {
  searchRef: RefObject<HTMLInputElement | null>;
}

export function Tree({ searchRef }: TreeProps) {
  const { data: resources = [] } = useResources();
  const navigate = useNavigate();
  const [filter, setFilter] = useState('');
  const [collapsedList, setCollapsed] = useLocalStorage<string[]>({ key: 'atoll.tree.collapsed', defaultValue: [] });
  const [activeId, setActive] = useState('datacenter');
  const list = useMemo(() => rows(resources, filter, new Set(collapsedList)), [resources, filter, collapsedList]);
  const currentId = useCurrentRow(list);
  const viewport = useRef<HTMLDivElement>(null);
  const treeRef = useRef<HTMLDivElement>(null);
  const virtual = useVirtualizer({ count: list.length, getScrollElement: () => viewport.current, estimateSize: () => ROW_PIXELS, overscan: 12 });
  const activeIndex = Math.max(0, list.findIndex((row) => row.id === activeId));

  const toggle = useCallback(
    (id: string) => setCollapsed((ids) => (ids.includes(id) ? ids.filter((other) => other !== id) : [...ids, id])),
    [setCollapsed],
  );
  const open = useCallback(
    (row: Row) => {
      setActive(row.id);
      void navigate({ href: row.link });
    },
    [navigate],
  );
  const moveTo = (index: number) => {
    setActive(list[index]?.id ?? 'datacenter');
    virtual.scrollToIndex(index);
  };
  const onKey = (event: KeyboardEvent) => {
    const move = event.ctrlKey || event.altKey || event.metaKey ? null : keyMove(event.key, list, activeIndex);
    if (!move) return;
    event.preventDefault();
    if ('to' in move) moveTo(move.to);
    else if ('toggle' in move) toggle(move.toggle);
    else if (list[move.open]) open(list[move.open] as Row);
  };
  const onSearchKey = (event: KeyboardEvent) => {
    const first = list.findIndex((row) => row.level === 3);
    if (event.key === 'Escape') setFilter('');
    else if (event.key === 'Enter' && list[first]) open(list[first]);
    else if (event.key === 'ArrowDown') {
      event.preventDefault();
      moveTo(Math.max(0, first));
      treeRef.current?.focus();
    }
  };

  return (
    <div className="atoll-tree">
      <TextInput
        ref={searchRef}
        size="xs"
        m={8}
        aria-label="Search guests, nodes and storages"
        placeholder="Search  ( / )"
        leftSection={<IconSearch size={14} aria-hidden />}
        rightSection={
          filter && (
            <ActionIcon variant="subtle" size="sm" aria-label="Clear the search" onClick={() => setFilter('')}>
              <IconX size={13} />
            </ActionIcon>
          )
        }
        value={filter}
        onChange={(event) => setFilter(event.currentTarget.value)}
        onKeyDown={onSearchKey}
      />
      <ScrollArea viewportRef={viewport} className="atoll-tree-scroll" scrollbarSize={8} viewportProps={{ tabIndex: -1 }}>
        <div
          ref={treeRef}
          role="tree"
          aria-label="Datacenter"
          tabIndex={0}
          aria-activedescendant={`tree-${list[activeIndex]?.id}`}
          onKeyDown={onKey}
          className="atoll-tree-rows"
          style={{ height: virtual.getTotalSize() }}
        >
          {virtual.getVirtualItems().map((item) => {
            const row = list[item.index];
            return row && <TreeRow key={row.id} row={row} top={item.start} active={item.index === activeIndex} current={row.id === currentId} onOpen={open} onToggle={toggle} />;
          })}
        </div>
      </ScrollArea>
      {filter && list.length === 1 && <p className="atoll-empty">Nothing matches “{filter}”.</p>}
    </div>
  );
}

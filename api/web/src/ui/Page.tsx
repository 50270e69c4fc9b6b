// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The frame of a page: heading with state and actions, tabs whose choice is part of the address.
import { Box, Group, Tabs, Title } from '@mantine/core';
import { useNavigate } from '@tanstack/react-router';
import { useEffect, type ReactNode } from 'react';

export interface Tab {
  value: string;
  label: string;
  content: ReactNode;
}

interface PageProps {
  title: string;
  icon?: ReactNode;
  badge?: ReactNode;
  actions?: ReactNode;
  /** Address of the page; the first tab lives at it, the others below it. */
  base: string;
  tab: string | undefined;
  tabs: Tab[];
}

export function Page({ title, icon, badge, actions, base, tab, tabs }: PageProps) {
  const navigate = useNavigate();
  const current = tabs.find((row) => row.value === tab) ?? tabs[0];
  useEffect(() => {
    document.title = `${title} – Atoll`;
  }, [title]);
  const open = (value: string | null) => {
    if (!value) return;
    const below = base === '/' ? `/datacenter/${value}` : `${base}/${value}`;
    void navigate({ href: value === tabs[0]?.value ? base : below });
  };
  return (
    <Box className="atoll-page">
      <Group justify="space-between" className="atoll-page-head" gap="sm">
        <Group gap="xs" wrap="nowrap" miw={0}>
          {icon}
          <Title order={1} style={{ overflow: 'hidden', textOverflow: 'ellipsis' }}>
            {title}
          </Title>
          {badge}
        </Group>
        {actions}
      </Group>
      <Tabs value={current?.value ?? null} onChange={open} keepMounted={false} className="atoll-tabs" activateTabWithKeyboard={false}>
        <Tabs.List>
          {tabs.map((row) => (
            <Tabs.Tab key={row.value} value={row.value}>
              {row.label}
            </Tabs.Tab>
          ))}
        </Tabs.List>
        {tabs.map((row) => (
          <Tabs.Panel key={row.value} value={row.value} className="atoll-tab" tabIndex={-1}>
            {row.content}
          </Tabs.Panel>
        ))}
      </Tabs>
    </Box>
  );
}
